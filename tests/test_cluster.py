"""cluster.yaml is what Ray's own schema allows."""

from pathlib import Path

import yaml


def test_cluster_yaml_is_valid():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())))
