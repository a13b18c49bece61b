"""cluster.yaml is what Ray's own schema allows, and Ray's schema refuses what is wrong."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_yaml_is_valid():
    validate_config(prepare_config(cluster()))


@pytest.mark.parametrize("place", [[], ["available_node_types", "gpu"], ["docker"]])
def test_a_misspelt_key_would_be_noticed(place):
    config = cluster()
    section = config
    for key in place:
        section = section[key]
    section["max_wrkers"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_wrkers"):
        validate_config(prepare_config(config))


def test_a_head_that_is_none_of_the_node_types_would_be_noticed():
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config({**cluster(), "head_node_type": "hed"}))


def test_the_cluster_runs_the_ray_that_is_pinned_and_asks_for_the_token():
    config = cluster()
    [pinned] = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert config["docker"]["image"].startswith(f"rayproject/ray:{pinned}-py311")
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all(command.startswith("export RAY_AUTH_MODE=token; ") for command in starts)


def test_every_machine_may_read_the_store():
    """Ray's own profile goes to the head only: the workers, which read and write, had no rights."""
    for name, kind in cluster()["available_node_types"].items():
        assert "IamInstanceProfile" in kind["node_config"], name
