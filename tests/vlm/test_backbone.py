"""Backbone: a row's states are its own whatever the batch, layers are read where they are asked for, and images matter."""

import ast
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import ConfigError
from pipeline.vlm.backbone import check_images_matter, check_images_reach, load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.heads import HeadShape, head_of
from pipeline.vlm.message import MARKER, Message
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.reading import read
from pipeline.vlm.settings import Reading, Sizes
from pipeline.vlm.templates import template_of, with_placeholder
from tests.vlm.models import FAMILIES, LAYERS, WIDTH, picture

PICTURES = (picture(1, 40, 20), picture(2, 16, 50), picture(3, 64, 64))
MESSAGES = [
    Message("a cat"),
    Message("", PICTURES[:1]),
    Message("what is this?", PICTURES[1:2]),
    Message(f"a {MARKER} b {MARKER}{MARKER} c", PICTURES),
    Message("a much longer text than the others, " * 6),
]


def rows_of(backbone, messages):
    return [backbone.preparer.read(message, template_of("plain")) for message in messages]


def vectors_of(backbone, messages, **reading):
    with torch.inference_mode():
        return read(backbone, rows_of(backbone, messages), Reading(**reading))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_states_alone_and_in_a_batch(family, backbone_of):
    backbone = backbone_of(family)
    rows = rows_of(backbone, MESSAGES)
    with torch.inference_mode():
        together, mask_BT = backbone.states(rows, (1, -1))
        assert mask_BT.sum(dim=1).tolist() == [len(row) for row in rows]
        for index, row in enumerate(rows):
            alone, _ = backbone.states([row], (1, -1))
            for layer in (1, -1):
                assert alone[layer].shape == (1, len(row), WIDTH)
                difference = (together[layer][index, : len(row)] - alone[layer][0]).abs().max()
                assert difference < 1e-5 * alone[layer].abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_number_of_images_matter(family, backbone_of):
    a, b, _ = PICTURES
    messages = [
        Message(f"one {MARKER} two {MARKER}", (a, b)),
        Message(f"one {MARKER} two {MARKER}", (b, a)),
        Message(f"{MARKER}one two {MARKER}", (a, b)),
        Message(f"one {MARKER} two ", (a,)),
        Message("one  two "),
    ]
    vectors = vectors_of(backbone_of(family), messages, pooling="mean").numpy()
    differences = np.abs(vectors[:, None] - vectors[None]).max(axis=-1)
    assert differences[~np.eye(len(messages), dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layers_states_are_those_of_transformers_under_the_final_norm(family, backbone_of):
    backbone = backbone_of(family)
    rows = rows_of(backbone, MESSAGES)
    layers = tuple(range(2 if family == "qwen3_vl" else 0, LAYERS + 1))  # 0 and 1 have its deeper image features here
    with torch.inference_mode():
        batch = backbone.preparer.collate(rows)
        theirs = backbone.model(**batch, output_hidden_states=True).hidden_states
        ours, mask_BT = backbone.states(rows, layers)
        assert len(theirs) == LAYERS + 1
        for layer in layers:
            wanted = theirs[layer] if layer == LAYERS else backbone.final_norm(theirs[layer])
            assert torch.equal(ours[layer][mask_BT.bool()], wanted[mask_BT.bool()])


def test_what_deepstack_adds_is_in_the_states(backbone_of):
    backbone, added = backbone_of("qwen3_vl"), []
    rows = rows_of(backbone, MESSAGES[1:2])
    hook = backbone.decoder_layers[1].register_forward_pre_hook(lambda _, args: added.append(args[0].clone()))
    with torch.inference_mode():
        states, _ = backbone.states(rows, (1, -1))
        hook.remove()
        assert torch.equal(states[1], backbone.final_norm(added[0]))


@pytest.mark.parametrize("layer", [1, 2, LAYERS, -1, -2])
def test_deeper_layers_than_asked_for_are_not_computed(layer, backbone_of):
    backbone, ran = backbone_of("qwen2_5_vl"), []
    hooks = [each.register_forward_hook(lambda *_, depth=depth: ran.append(depth)) for depth, each in enumerate(backbone.decoder_layers, 1)]
    with torch.inference_mode():
        states, _ = backbone.states(rows_of(backbone, MESSAGES[:2]), (layer,))
    for hook in hooks:
        hook.remove()
    deepest = layer if layer > 0 else LAYERS + 1 + layer
    assert ran == list(range(1, deepest + 1))
    assert list(states) == [layer]


def test_a_layer_that_is_not_there_is_refused(backbone_of):
    backbone = backbone_of("llava")
    with pytest.raises(ConfigError, match=f"layer=9 must lie between 1 and {LAYERS}"):
        backbone.states(rows_of(backbone, MESSAGES[:1]), (9,))


def test_threads_get_their_own_layers(backbone_of):
    backbone = backbone_of("idefics3")
    rows = [rows_of(backbone, [message]) for message in MESSAGES]

    def states(task):
        row, layer = task
        with torch.inference_mode():
            return backbone.states(rows[row], (layer,))[0][layer]

    tasks = [(row, layer) for row in range(len(rows)) for layer in (1, 2, 3)] * 3
    wanted = [states(task) for task in tasks]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(states, tasks))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_token_without_its_feature_is_an_error(family, backbone_of):
    backbone = backbone_of(family)
    [row] = rows_of(backbone, MESSAGES[2:3])
    ids = row.input_ids.clone()
    ids[(ids == backbone.image_token_id).nonzero()[0]] = int(ids[-1])
    with pytest.raises(ValueError, match="do not match"):
        backbone.states([replace(row, input_ids=ids)])


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_have_a_gradient(family, backbone_of):
    check_images_matter(backbone_of(family))


def test_a_model_that_drops_its_images_is_refused(folder_of):
    base = base_of(str(folder_of("llava")))
    backbone = load_backbone(base, Preparer(base, Sizes()), dtype="float32", device="cpu")
    torch.nn.init.zeros_(backbone.model.multi_modal_projector.linear_2.weight)
    for check in (check_images_reach, check_images_matter):
        with pytest.raises(ConfigError, match="images do not reach the model"):
            check(backbone)


def test_a_tower_without_gradient_is_refused(folder_of):
    base = base_of(str(folder_of("llava")))
    backbone = load_backbone(base, Preparer(base, Sizes()), dtype="float32", device="cpu")
    backbone.model.multi_modal_projector.register_forward_hook(lambda _, __, output: output.detach())
    check_images_reach(backbone)
    with pytest.raises(ConfigError, match="vision tower is cut off"):
        check_images_matter(backbone)


def test_gradients_reach_the_weights_of_shallow_layers_with_checkpointing(folder_of):
    base = base_of(str(folder_of("qwen2_vl")))
    backbone = load_backbone(base, Preparer(base, Sizes()), dtype="float32", device="cpu")
    backbone.model.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.model.gradient_checkpointing_enable()
            backbone.model.train()
        backbone.model.zero_grad()
        read(backbone, rows_of(backbone, MESSAGES[:3]), Reading(layer=2)).pow(3).sum().backward()
        gradients.append([None if values.grad is None else values.grad.clone() for values in backbone.model.parameters()])
        deepest = next(backbone.decoder_layers[-1].parameters())
        assert deepest.grad is None or not deepest.grad.any()
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.allclose(plain, checkpointed, atol=1e-6)
    assert sum(values is not None and bool(values.any()) for values in gradients[0]) > 20


def test_weights_that_are_missing_are_named(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("qwen2_vl"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: values for name, values in weights.items() if "visual" not in name}, folder / "model.safetensors", metadata={"format": "pt"})
    base = base_of(str(folder))
    with pytest.raises(ConfigError, match=r"would be random numbers: visual\."):
        load_backbone(base, Preparer(base, Sizes()), dtype="float32", device="cpu")


def test_a_folder_without_an_image_processor_is_refused(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("qwen2_vl"), tmp_path / "model")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="Save the processor"):
        base_of(str(folder))


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"type 'bert'.*qwen2_vl.*Sentence"):
        base_of(str(tmp_path))


@pytest.mark.parametrize("pooling", ["last", "mean", "cls", "weightedmean"])
def test_vectors_are_pooled_in_float32_over_tokens_that_are_no_padding(pooling, backbone_of):
    backbone = backbone_of("llava_onevision")
    rows = rows_of(backbone, MESSAGES)
    found = vectors_of(backbone, MESSAGES, pooling=pooling, layer=2, width=20)
    for row, vector in zip(rows, found, strict=True):
        with torch.inference_mode():
            states_TD = backbone.states([row], (2,))[0][2][0].double()
        place = torch.arange(1, len(row) + 1).double()[:, None]
        wanted = {
            "last": states_TD[-1],
            "cls": states_TD[0],
            "mean": states_TD.mean(dim=0),
            "weightedmean": (states_TD * place).sum(dim=0) / place.sum(),
        }[pooling][:20]
        assert vector.dtype == torch.float32
        assert (vector - wanted / wanted.norm()).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["latent-attention", "multi-layer"])
def test_a_heads_vector_is_a_rows_own_and_has_a_gradient(kind, backbone_of):
    torch.manual_seed(0)
    backbone = backbone_of("qwen2_vl")
    head = head_of(HeadShape(kind=kind, latents=8, heads=2), WIDTH, layers=2)
    rows = rows_of(backbone, MESSAGES)
    together = read(backbone, rows, Reading(layer=2), head)
    for index, row in enumerate(rows):
        assert (read(backbone, [row], Reading(layer=2), head)[0] - together[index]).abs().max() < 1e-5
    assert torch.allclose(together.norm(dim=1), torch.ones(len(rows)))
    together.pow(3).sum().backward()
    assert head.latents.grad is not None and bool(head.latents.grad.any())


def test_prepending_needs_a_placeholder_in_every_row(backbone_of):
    backbone, with_one = backbone_of("qwen2_vl"), with_placeholder(template_of("prompt-eol"))
    rows = [backbone.preparer.read(message, with_one) for message in MESSAGES]
    places = [int((row.input_ids == backbone.preparer.tokenizer.pad_token_id).nonzero()[0, 0]) for row in rows]
    assert [row.place for row in rows] == places
    assert rows[0].place == len('This sentence : "')
    with torch.inference_mode():
        read(backbone, rows, Reading(prepending=(1, 3)))
        with pytest.raises(ValueError, match="no placeholder"):
            read(backbone, rows_of(backbone, MESSAGES), Reading(prepending=(1, 3)))


@pytest.mark.parametrize("path", sorted(Path("pipeline/vlm").glob("*.py")), ids=lambda path: path.name)
def test_no_module_here_knows_ray(path):
    names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"ray", "lance", "lancedb"}
