import json
import shutil

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.encoders.vlm import Vlm
from pipeline.vlm.heads import HeadShape
from pipeline.vlm.message import Message
from pipeline.vlm.saved import open_vlm, sealed
from pipeline.vlm.settings import Prompt, Reading, Sizes
from pipeline.vlm.spec import FILE, FORMAT, EncoderSpec, Origin, load_spec
from pipeline.vlm.textimage import Page

SETTINGS = {
    "prompt": Prompt(template="plain", query_instruction="Find it."),
    "sizes": Sizes(max_pixels=24 * 24),
    "reading": Reading(pooling="mean", width=16),
}


@pytest.fixture
def folder(tmp_path, folder_of):
    """A small model, saved with a sealed spec."""
    made = shutil.copytree(folder_of("qwen2_vl"), tmp_path / "encoder")
    sealed(EncoderSpec(**SETTINGS, widths=(16, 32)), made).save(made)
    return made


def edited(folder, **values):
    path = folder / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_spec_is_what_was_saved(folder):
    spec = load_spec(folder)
    assert spec.prompt == SETTINGS["prompt"] and spec.sizes == SETTINGS["sizes"] and spec.reading == SETTINGS["reading"]
    assert spec.widths == (16, 32) and spec.format == FORMAT
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= set(spec.files) | {"preprocessor_config.json"}
    assert FILE not in spec.files


def test_a_saved_encoder_is_the_one_that_a_job_file_would_spell_out(folder):
    saved, spelt = open_vlm(str(folder)), Vlm(str(folder), **{name: value.model_dump() for name, value in SETTINGS.items()})
    assert saved.fingerprint == spelt.fingerprint == load_spec(folder).fingerprint
    assert saved.lineage == spelt.lineage and saved.dim == 16


def test_a_trained_width_or_layer_may_be_asked_for_and_is_another_encoder(folder):
    saved, wide = open_vlm(str(folder)), open_vlm(str(folder), width=32)
    assert (saved.dim, wide.dim) == (16, 32) and saved.fingerprint != wide.fingerprint
    assert open_vlm(str(folder), width=16).fingerprint == saved.fingerprint
    message = Message("a cat")
    long = wide.encode_messages([message])[0, :16]
    np.testing.assert_allclose(saved.encode_messages([message])[0], long / np.linalg.norm(long), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="width=24 was not trained; trained are 16, 32"):
        open_vlm(str(folder), width=24)
    with pytest.raises(ConfigError, match="layer=2 was not trained; trained are none but the one it was saved with"):
        open_vlm(str(folder), layer=2)


def test_a_folder_may_be_moved(folder, tmp_path):
    before = load_spec(folder)
    moved = shutil.move(folder, tmp_path / "elsewhere" / "deeper")
    assert load_spec(moved) == before
    assert open_vlm(str(moved)).fingerprint == before.fingerprint


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_named(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} is not the file that was saved \(sha256 "):
        open_vlm(str(folder))


def test_a_missing_file_and_one_that_came_are_named(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config.json came after the encoder was saved"):
        load_spec(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "README.md").write_text("A card is no part of it.")
    load_spec(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json is missing: .*copy the folder again"):
        load_spec(folder)


def test_unknown_keys_are_errors_that_name_the_nearest_one(folder):
    edited(folder, readings={})
    with pytest.raises(ConfigError, match=r"readings: unknown key; did you mean 'reading'\?; the keys here are format, base"):
        load_spec(folder)
    edited(folder, readings=None)
    values = json.loads((folder / FILE).read_text())
    del values["readings"]
    values["reading"]["poling"] = "mean"
    (folder / FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"reading.poling: unknown key; did you mean 'pooling'\?"):
        load_spec(folder)


def test_a_newer_format_is_refused_with_what_to_do(folder):
    edited(folder, format=FORMAT + 1, what_the_future_brings=True)
    with pytest.raises(ConfigError, match=rf"format {FORMAT + 1}, and this release reads up to {FORMAT}: upgrade \(pip install -U tessera\)"):
        load_spec(folder)
    edited(folder, format="x")
    with pytest.raises(ConfigError, match="does not say which format it is"):
        load_spec(folder)


def test_an_edited_setting_is_found_by_the_fingerprint(folder):
    edited(folder, prompt={"template": "plain", "query_instruction": "Find them."})
    with pytest.raises(ConfigError, match="it was edited, or this release reads it otherwise"):
        open_vlm(str(folder))


def test_a_folder_without_a_spec_and_a_broken_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no saved encoder: tessera.json is not in it"):
        load_spec(tmp_path)
    (tmp_path / FILE).write_text('{"format": 1')
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load_spec(tmp_path)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ConfigError, match="must hold keys and values, not list"):
        load_spec(tmp_path)


def test_what_changes_vectors_changes_the_fingerprint_and_what_was_trained_does_not(folder):
    spec = load_spec(folder)
    variants = {
        "template": {"prompt": Prompt(template="vlm2vec-v2", query_instruction="Find it.")},
        "pixels": {"sizes": Sizes(max_pixels=32 * 32)},
        "pooling": {"reading": Reading(pooling="last", width=16)},
        "width": {"reading": Reading(pooling="mean")},
        "dtype": {"dtype": "bfloat16"},
        "page": {"page": Page()},
        "another page": {"page": Page(font_px=18)},
    }
    found = {name: sealed(spec.model_copy(update=values), folder).fingerprint for name, values in variants.items()}
    assert len({spec.fingerprint, *found.values()}) == len(variants) + 1
    assert sealed(spec.model_copy(update={"widths": (), "layers": (3,)}), folder).fingerprint == spec.fingerprint


def test_a_base_outside_the_folder_is_compared_too(folder_of, tmp_path):
    outside = shutil.copytree(folder_of("qwen2_vl"), tmp_path / "base")
    own = tmp_path / "encoder"
    own.mkdir()
    spec = sealed(EncoderSpec(base=Origin(model=str(outside))), own)
    spec.save(own)
    assert list(spec.base.files) == ["model.safetensors"]
    assert open_vlm(str(own)).fingerprint == Vlm(str(outside)).fingerprint
    content = bytearray((outside / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (outside / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"base/model.safetensors is not the file that was saved"):
        open_vlm(str(own))
    shutil.rmtree(outside)
    with pytest.raises(ConfigError, match=r"the base model's folder .* is not there"):
        open_vlm(str(own))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": {"model": "org/name", "revision": "main"}}, "must be a commit of 40 digits"),
        ({"base": {"model": ".", "revision": "a" * 40}}, "is for a model of the hub"),
        ({"widths": [16, 32], "reading": {"width": 24}}, "reading.width=24 was not trained; trained are 16, 32"),
        ({"layers": [2, 3], "reading": {"layer": 1}}, "reading.layer=1 was not trained; trained are 2, 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EncoderSpec.model_validate(values)


def test_a_head_belongs_to_the_json(folder):
    spec = EncoderSpec(head=HeadShape(kind="multi-layer", latents=4, vectors="mean"))
    spec.save(folder)
    assert json.loads((folder / FILE).read_text())["head"] == {"kind": "multi-layer", "latents": 4, "heads": 8, "head_dim": None, "vectors": "mean"}
