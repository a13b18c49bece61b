"""Adapters of PEFT: merged as they were trained, under every name that transformers has had for the same weight."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline.config import ConfigError
from pipeline.vlm.adapter import adapter_lineage
from pipeline.vlm.backbone import load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.message import Message
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.settings import Sizes
from pipeline.vlm.templates import template_of
from tests.vlm.models import picture

MESSAGE = Message("a cat", (picture(1, 40, 20),))


def save_adapter(folder, base, kind, *, targets=r".*language_model.*(q_proj|up_proj)|.*visual.*(qkv|linear_fc1|fc1)"):
    """A LoRA adapter with random weights, trained, so to say, on the class `kind`; the model that it was trained on is returned."""
    torch.manual_seed(5)
    model = get_peft_model(getattr(transformers, kind).from_pretrained(base), LoraConfig(r=4, target_modules=targets)).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name:
                values.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def states_of(folder, *, adapter=None):
    base = base_of(str(folder))
    backbone = load_backbone(base, Preparer(base, Sizes()), dtype="float32", device="cpu", adapter=adapter)
    row = backbone.preparer.read(MESSAGE, template_of("plain"))
    with torch.inference_mode():
        return backbone.states([row])[0][-1][0], backbone.preparer.collate([row])


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForImageTextToText"])
def test_an_adapter_does_what_it_does_in_peft(family, kind, folder_of, tmp_path):
    trained = save_adapter(tmp_path / "adapter", folder_of(family), kind)
    ours, batch = states_of(folder_of(family), adapter=tmp_path / "adapter")
    with torch.inference_mode():
        theirs = trained(**batch, output_hidden_states=True).hidden_states[-1][0]
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - states_of(folder_of(family))[0]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen2_vl", "base_model.model.language_model.layers.", "base_model.model.model.layers."),
        ("llava", "base_model.model.language_model.layers.", "base_model.model.language_model.model.layers."),
    ],
)
def test_names_from_before_transformers_4_52_are_understood(family, old, new, folder_of, tmp_path):
    save_adapter(tmp_path, folder_of(family), "AutoModel")
    wanted, _ = states_of(folder_of(family), adapter=tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.startswith(old) for name in weights)
    save_file({name.replace(old, new): values for name, values in weights.items()}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    found, _ = states_of(folder_of(family), adapter=tmp_path)
    assert torch.equal(found, wanted)


def test_an_adapter_of_another_model_is_refused(folder_of, tmp_path):
    """PEFT only warns, and leaves the model as it was."""
    save_adapter(tmp_path, folder_of("qwen2_vl"), "AutoModel")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name.replace("layers.1.", "layers.7."): values for name, values in weights.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"have no place \(base_model.model.language_model.layers.7.*another base"):
        states_of(folder_of("qwen2_vl"), adapter=tmp_path)


def test_an_adapters_lineage_is_what_it_holds(folder_of, tmp_path):
    save_adapter(tmp_path, folder_of("qwen2_vl"), "AutoModel")
    first = adapter_lineage(tmp_path)
    (tmp_path / "README.md").write_text("another text")
    assert adapter_lineage(tmp_path) == first
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert adapter_lineage(tmp_path) != first
    with pytest.raises(ConfigError, match="holds no adapter"):
        adapter_lineage(tmp_path / "nowhere")
