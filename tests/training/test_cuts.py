"""Several layers and widths, and a head, from the job's settings to the encoder that is opened."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from jobs.train import TrainJob, _task
from pipeline.config import ConfigError, Ref
from pipeline.encoders.saved import open_encoder
from pipeline.training.batches import Told
from pipeline.training.infonce import InfoNCE
from pipeline.training.loop import train
from pipeline.training.matryoshka import Cuts, grid
from pipeline.training.trainable import built
from pipeline.training.vlm import TrainVlm
from pipeline.vlm.card import Card
from pipeline.vlm.message import Message
from tests.training.pairs import Folder, job_values, write_pairs
from tests.training.test_infonce import assert_same
from tests.training.test_matryoshka import layers
from tests.vlm.models import LAYERS, WIDTH, picture, save_model

MESSAGES = [Message("a cat"), Message("{}", (picture(1),)), Message("two dogs run")]
INFONCE = {"target": "pipeline.training.infonce:InfoNCE", "args": {"temperature": 0.1}}
GRID = {"target": "pipeline.training.matryoshka:grid", "args": {"loss": INFONCE, "layers": [1, 2], "widths": [8, 16]}}
HEAD = {"kind": "latent-attention", "latents": 4, "heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    write_pairs(folder, num=24, held_out=4)
    save_model(folder / "model", "qwen2_vl")
    return folder


def model_of(place, **args):
    return TrainVlm(str(place / "model"), **args)


def run(place, name, **sections):
    """A job's run of 3 steps in this process; its folder."""
    values = {**job_values(place, place / "model", name=name, steps=3), "held_out": []} | {"loss": INFONCE} | sections
    values["model"] = {"target": "pipeline.training.vlm:TrainVlm", "args": {"model": str(place / "model"), **values.get("args", {})}}
    values.pop("args", None)
    task = _task(TrainJob.model_validate(values))
    folder = place / "runs" / name
    folder.mkdir(parents=True)
    train(task, Folder(folder / "checkpoints"), torch.device("cpu"))
    return folder


def test_the_grid_is_every_layer_at_every_width():
    sides, notes = layers()
    loss = InfoNCE(0.1)
    wanted = sum(
        loss(*(normalize(side[layer][..., :width], dim=-1) for side in sides), notes) for layer in range(3) for width in (2, 4, sides[0][0].shape[1])
    )
    assert_same(grid(loss, [5, 9], [4, 2])(*sides, notes), wanted, [leaf for side in sides for leaf in side])
    assert grid(loss, [9, 5], [4, 2]).cuts == Cuts((5, 9), (2, 4))


def test_an_encoder_opens_at_each_layer_and_width_that_was_trained_and_at_no_other(place):
    folder = str(run(place, "grid", loss=GRID) / "encoder")
    found = {}
    for layer in (None, 1, 2, LAYERS):
        for width in (None, 8, 16, WIDTH):
            encoder = open_encoder(folder, layer=layer, width=width)
            assert encoder.dim == (width or WIDTH)
            found[layer or LAYERS, width or WIDTH] = encoder
    assert len({encoder.fingerprint for encoder in found.values()}) == 9
    assert open_encoder(folder).fingerprint == found[LAYERS, WIDTH].fingerprint
    whole, cut = (found[1, width].encode_messages(MESSAGES) for width in (WIDTH, 8))
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ConfigError, match="width=12 was not trained; trained are 8, 16, 32"):
        open_encoder(folder, width=12)
    with pytest.raises(ConfigError, match="layer=9 was not trained; trained are 1, 2, 3"):
        open_encoder(folder, layer=9)


def test_what_is_trained_at_a_layer_is_what_the_saved_encoder_gives_there(place, tmp_path):
    model = model_of(place, head=HEAD)
    model.learn_at(Cuts((1, 2), (8,)))
    model.load(torch.device("cpu"))
    trained = model.embed([model.prepare(Told(message, ""), query=False) for message in MESSAGES])
    model.save(tmp_path / "encoder", Card(name="x", base="x"))
    for layer, vectors in zip((1, 2, LAYERS), trained, strict=True):
        opened = open_encoder(str(tmp_path / "encoder"), layer=layer)
        np.testing.assert_allclose(opened.encode_messages(MESSAGES), vectors.detach().numpy(), atol=1e-5)
    assert not torch.allclose(trained[0], trained[1], atol=1e-2)


def test_a_matryoshka_of_widths_alone_needs_one_layer(place):
    loss = {"target": "pipeline.training.matryoshka:Matryoshka", "args": {"loss": INFONCE, "widths": [8]}}
    folder = str(run(place, "widths", loss=loss) / "encoder")
    assert open_encoder(folder, width=8).dim == 8
    with pytest.raises(ConfigError, match="layer=1 was not trained; trained are none"):
        open_encoder(folder, layer=1)


@pytest.mark.parametrize("kind", ["latent-attention", "multi-layer"])
def test_a_head_is_trained_alone_saved_and_used(place, kind):
    folder = run(place, kind, args={"head": {**HEAD, "kind": kind}, "parts": []})
    torch.manual_seed(0)
    before = model_of(place, head={**HEAD, "kind": kind}, parts=[])
    before.load(torch.device("cpu"))
    head = load_file(folder / "encoder" / "head.safetensors")
    assert head.keys() == before._head.state_dict().keys()
    moved = [name for name, values in before._head.state_dict().items() if not torch.equal(values, head[name])]
    assert len(moved) > 0.9 * len(head)
    opened = open_encoder(str(folder / "encoder"))
    fingerprint = before.save(folder / "untrained", Card(name="x", base="x"))
    untrained = open_encoder(str(folder / "untrained"))
    backbones = [(folder / name / "model.safetensors").read_bytes() for name in ("encoder", "untrained")]
    assert backbones[0] == backbones[1], "the model beneath was to stay as it is"
    assert len({opened.fingerprint, fingerprint, open_without(place).fingerprint}) == 3
    vectors = [encoder.encode_messages(MESSAGES) for encoder in (opened, untrained, open_without(place))]
    assert min(np.abs(vectors[0] - other).max() for other in vectors[1:]) > 1e-3
    before._head.load_state_dict(head)
    again = before.embed([before.prepare(Told(message, ""), query=False) for message in MESSAGES]).detach().numpy()
    np.testing.assert_allclose(vectors[0], again, atol=1e-5)


def open_without(place):
    from pipeline.encoders.vlm import Vlm

    return Vlm(str(place / "model"))


@pytest.mark.parametrize(
    ("loss", "args", "problem"),
    [
        ({"layers": [3]}, {}, r"layers are \[3\], and must be below 3"),
        ({"layers": [1], "widths": [32]}, {}, r"widths are \[32\], and must be below 32"),
        ({"layers": [2]}, {"reading": {"layer": 2}}, "must be below 2"),
        ({"layers": [1]}, {"head": {"kind": "multi-layer"}}, "reads all 3 layers at once"),
        ({"layers": []}, {}, "must name one layer at least"),
        ({"layers": [1], "loss": {"target": "pipeline.training.infonce:InfoNSE"}}, {}, "did you mean 'InfoNCE'"),
    ],
)
def test_cuts_that_the_model_has_not_are_told_before_work_starts(place, loss, args, problem):
    model = Ref(target="pipeline.training.vlm:TrainVlm", args={"model": str(place / "model"), **args})
    with pytest.raises(ConfigError, match=problem):
        built(model, Ref(target=GRID["target"], args={"loss": INFONCE, **loss}))


class Plain:
    """A Trainable that knows of no cuts."""

    load = prepare = embed = save = None


def test_a_model_that_could_not_save_them_is_refused():
    with pytest.raises(ConfigError, match="test_cuts:Plain could save none"):
        built(Ref(target="tests.training.test_cuts:Plain"), Ref(**GRID))
