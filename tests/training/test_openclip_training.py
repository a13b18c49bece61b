"""TrainOpenClip on small random models: what a step does, what stays locked, what is saved."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from jobs.train import TrainJob, _task
from pipeline.config import ConfigError
from pipeline.encoders.openclip import OpenClip
from pipeline.encoders.saved import open_encoder
from pipeline.testing import check_encoder
from pipeline.training.batches import Told
from pipeline.training.chunks import Rows
from pipeline.training.gather import world
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE
from pipeline.training.loop import train
from pipeline.training.openclip import TrainOpenClip
from pipeline.training.ranks import run_on_ranks
from pipeline.training.remembered import Remembered
from pipeline.vlm.card import Card, DataSource
from pipeline.vlm.message import Message
from pipeline.vlm.saved import open_vlm
from tests.encoders.models import TINY_CLIP, items_of, save_bert, save_open_clip
from tests.training.pairs import Folder, Stopped, losses, picture_values, write_pictures

CPU = torch.device("cpu")
BOTH = {"directions": ("query-document", "document-query")}
CARD = Card(name="run-7", base="tiny", data=(DataSource(name="pictures", rows=3),), settings={"mixture": {"seed": 4}})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP's own two towers."""
    return save_open_clip(tmp_path_factory.mktemp("clip") / "model", TINY_CLIP)


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """timm's EfficientNet, with batch norms, and a BERT; a linear head on each."""
    folder = save_bert(tmp_path_factory.mktemp("custom") / "model")
    vision = {"timm_model_name": "test_efficientnet", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    (folder / "model.safetensors").unlink()  # open_clip would take it for its own checkpoint
    return save_open_clip(folder, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**text, "context_length": 32}})


@pytest.fixture(scope="module", params=["clip", "custom"])
def name(request):
    return request.getfixturevalue(request.param)


def pictures(num=6, seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((70, 60))) for _ in range(num)]


TEXTS = ["a cat", "the dog sleeps on the red house", "x", "blue : cat", "a house", "runs"]


def loaded(name, **settings):
    model = TrainOpenClip(name, **settings)
    torch.manual_seed(0)
    model.load(CPU)
    return model


def prepared(model):
    queries = [model.prepare(Told(Message(text), ""), query=True) for text in TEXTS]
    return queries, [model.prepare(Told(Message("", (image,)), ""), query=False) for image in pictures()]


def gradients(name, **settings):
    """A batch's loss and gradients by weight, without dropout."""
    model = loaded(name, **settings)
    for part in model.modules[0].modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    queries, positives = prepared(model)
    loss = GradCache(model.embed, InfoNCE(**BOTH), model.modules, Rows(4)).step(queries, positives)
    return float(loss), {key: value.grad for key, value in model.modules[0].model.named_parameters() if value.grad is not None}, model


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"locked": {"image": 0}}], ids=str)
def test_a_step_is_that_of_plain_open_clip(name, settings):
    """The reference: open_clip's own model in eval mode, its own tokenizer, CLIP's loss written out, the batch at once."""
    loss, found, model = gradients(name, **settings)
    plain = open_clip.create_model(name).eval()
    if "locked" in settings:
        plain.lock_image_tower()
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    pixels = model._pixels.batch([model._resize(image) for image in pictures()], CPU, torch.float32)
    cosines = plain.encode_text(tokens, normalize=True) @ plain.encode_image(pixels, normalize=True).T / 0.05
    own = torch.arange(len(TEXTS))
    wanted = (torch.nn.functional.cross_entropy(cosines, own) + torch.nn.functional.cross_entropy(cosines.T, own)) / 2
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    expected = {key: value.grad for key, value in plain.named_parameters() if value.grad is not None}
    assert set(found) == set(expected)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-3, atol=2e-5, msg=lambda said, key=key: f"{key}: {said}")


def on_two_ranks(name):
    """Gradients of a rank's part of the batch: 4 rows on the first, 2 on the second."""
    model = loaded(name)
    model.modules[0].eval()
    queries, positives = prepared(model)
    rows = slice(0, 4) if world()[0] == 0 else slice(4, 6)
    if world()[1] == 1:
        rows = slice(0, 6)
    GradCache(model.embed, InfoNCE(**BOTH), model.modules, Rows(3)).step(queries[rows], positives[rows])
    return {key: value.grad for key, value in model.modules[0].model.named_parameters() if value.grad is not None}


def test_gradients_are_the_same_on_one_and_on_two_ranks(custom):
    first, second = run_on_ranks(on_two_ranks, 2, custom)
    for key, grad in on_two_ranks(custom).items():
        torch.testing.assert_close(first[key], grad, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)


def test_a_locked_tower_does_not_move_and_its_head_does(custom):
    model = loaded(custom, locked={"image": 0, "text": 0})
    before = {key: value.clone() for key, value in model.modules[0].state_dict().items()}
    optimizer = torch.optim.SGD([value for value in model.modules[0].parameters() if value.requires_grad], lr=1.0)
    model.modules[0].train()
    queries, positives = prepared(model)
    GradCache(model.embed, InfoNCE(**BOTH), model.modules, Rows(4)).step(queries, positives)
    optimizer.step()
    moved = {key for key, value in model.modules[0].state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"model.visual.head.proj.weight", "model.text.proj.weight"}


def test_groups_of_a_locked_tower_are_trained_as_open_clip_counts_them(clip):
    model = loaded(clip, locked={"image": 2, "text": 1})
    plain = open_clip.create_model(clip)
    plain.lock_image_tower(unlocked_groups=2)
    plain.lock_text_tower(unlocked_layers=1)
    trained = {key for key, value in model.modules[0].model.named_parameters() if value.requires_grad}
    wanted = {key for key, value in plain.named_parameters() if value.requires_grad} - {"logit_scale"}
    assert trained == wanted and 0 < len(trained) < len(list(plain.parameters()))


def test_what_locked_towers_give_is_computed_once(custom):
    model = loaded(custom, locked={"image": 0, "text": 0})
    calls = []
    model.modules[0].model.visual.trunk.register_forward_hook(lambda *_: calls.append(1))
    queries, positives = prepared(model)
    for _ in range(3):
        GradCache(model.embed, InfoNCE(), model.modules, Rows(6)).step(queries, positives)
    assert len(calls) == 1


def test_memory_for_what_is_remembered_ends():
    found = Remembered(0)
    assert found.get([b"a", b"b"], lambda places: torch.ones(len(places), 3)).shape == (2, 3)
    assert len(found) == 0
    found = Remembered(1)
    asked = []
    for keys in ([b"a", b"a"], [b"b", b"a"], [b"b", b"c", b"a"]):
        values = found.get(keys, lambda places, keys=keys: numbers(keys, places, asked))
        assert values[:, 0].tolist() == [float(key[0]) for key in keys]
    assert asked == [[b"a", b"a"], [b"b"], [b"c"]]


def numbers(keys, places, asked):
    asked.append([keys[place] for place in places])
    return torch.tensor([[float(keys[place][0])] for place in places])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"locked": {"imgae": 0}}, "did you mean 'image'"),
        ({"locked": {"image": -1}}, "must be how many"),
        ({"locked": {"image": True}}, "must be how many"),
        ({"remember_mib": -1}, "remember_mib=-1"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"pretrained": "x"}, "has its own weights"),
    ],
)
def test_wrong_settings_are_told_before_weights_load(clip, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        TrainOpenClip(clip, **settings)


def test_nothing_to_train_is_an_error(clip):
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        loaded(clip, locked={"image": 0, "text": 0})


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        (
            Told(Message("a", (np.zeros((2, 2, 3), np.uint8),)), "", "x.jsonl#7"),
            "x.jsonl#7: .* takes an image or a text, and this row has an image and a text in one",
        ),
        (Told(Message("a"), "Find it"), "takes no instruction"),
    ],
)
def test_rows_that_two_towers_cannot_take_are_told(clip, told, problem):
    with pytest.raises(ConfigError, match=problem):
        loaded(clip).prepare(told, query=True)


def test_the_saved_folder_is_an_encoder_and_open_clip_loads_it(name, tmp_path):
    model = loaded(name)
    with torch.no_grad():
        for weights in model.modules[0].parameters():
            weights.add_(0.01 * torch.randn_like(weights))
    model.modules[0].eval()
    fingerprint = model.save(tmp_path / "encoder", CARD)
    encoder = open_encoder(str(tmp_path / "encoder"))
    assert encoder.fingerprint == fingerprint == OpenClip(f"local-dir:{tmp_path}/encoder").fingerprint
    assert encoder.training["run"] == "run-7" and encoder.training["data"][0]["name"] == "pictures"
    items = items_of([*TEXTS, *[None] * 6], [*[None] * 6, *pictures()])
    check_encoder(encoder, items)
    vectors = encoder.encode(items)
    queries, positives = prepared(model)
    with torch.no_grad():
        ours = torch.nn.functional.normalize(model.embed([*queries, *positives]), dim=1).numpy()
    np.testing.assert_allclose(vectors, ours, atol=1e-5)
    plain, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/encoder")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}/encoder")(TEXTS)
    with torch.no_grad():
        np.testing.assert_allclose(vectors[:6], plain.eval().encode_text(tokens, normalize=True).numpy(), atol=1e-5)
        pixels = torch.stack([transform(Image.fromarray(image)) for image in pictures()])
        # Their resize is Pillow's, ours torch's: one level of 255 in some pixels.
        np.testing.assert_allclose(vectors[6:], plain.encode_image(pixels, normalize=True).numpy(), atol=5e-3)


def test_a_saved_folder_may_be_moved_and_an_edited_one_is_refused(custom, tmp_path):
    model = loaded(custom, locked={"image": 0})
    fingerprint = model.save(tmp_path / "first", CARD)
    shutil.move(tmp_path / "first", tmp_path / "second")
    moved = open_encoder(str(tmp_path / "second"))
    assert moved.fingerprint == fingerprint
    assert moved.encode(items_of(["a cat"])).shape == (1, 24)
    with pytest.raises(ConfigError, match="is not empty"):
        model.save(tmp_path / "second", CARD)
    with pytest.raises(ConfigError, match="token_budget is for vision-language models"):
        open_encoder(str(tmp_path / "second"), token_budget=5)
    with pytest.raises(ConfigError, match="another kind of encoder"):
        open_vlm(str(tmp_path / "second"))
    config = tmp_path / "second" / "open_clip_config.json"
    config.write_text(config.read_text().replace("mean_pooler", "max_pooler"))
    with pytest.raises(ConfigError, match="is not the file that was saved"):
        open_encoder(str(tmp_path / "second"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


def task_of(place, name, run, **sections):
    model = {"target": "pipeline.training.openclip:TrainOpenClip", "args": {"model": name, "locked": {"image": 1}}}
    task = _task(TrainJob.model_validate(picture_values(place, model, name=run, steps=6, **sections)))
    (place / "runs" / run).mkdir(parents=True)
    return task


def on_a_rank(task, stop_after):
    try:
        train(task, Folder(f"{task.folder}/checkpoints", stop_after=stop_after), CPU)
    except Stopped:
        return True
    return False


def test_a_sharded_run_on_two_workers_that_is_stopped_goes_on_with_one_as_if_nothing_had_been(place, clip):
    whole = task_of(place, clip, "whole")
    outcome = train(whole, Folder(f"{whole.folder}/checkpoints"), CPU)
    task = task_of(place, clip, "stopped", workers={"num": 2, "sharding": "fsdp2"})
    assert run_on_ranks(on_a_rank, 2, task, 4) == [True, True]
    again = train(task, Folder(f"{task.folder}/checkpoints"), CPU)
    ours, theirs = losses(task.folder), losses(whole.folder)
    np.testing.assert_allclose([ours[step] for step in range(6)], [theirs[step] for step in range(6)], rtol=1e-4)
    assert set(outcome.before) >= {"words/recall@3", "pictures/recall@3"}
    items = items_of(["red", "blue"])
    np.testing.assert_allclose(open_encoder(again.encoder).encode(items), open_encoder(outcome.encoder).encode(items), atol=1e-4)
    spec = json.loads((place / "runs" / "whole" / "encoder" / "tessera.json").read_text())
    assert spec["training"]["run"] == "whole" and spec["training"]["settings"]["mixture"]["batch_size"] == 8
