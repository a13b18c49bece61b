"""OpenClip: the vectors of open_clip itself, for its own towers, SigLIP's kind, and timm with a Hugging Face text tower."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pipeline.config import ConfigError
from pipeline.encoders.openclip import OpenClip
from pipeline.testing import check_encoder
from tests.encoders.models import TINY_CLIP, items_of, save_bert, save_open_clip, save_tokenizer, siglip_config

TEXTS = ["a cat", "the dog sleeps on the red house " * 3, "", "x"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_open_clip(tmp_path_factory.mktemp("clip") / "model", TINY_CLIP)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip") / "model"
    save_tokenizer(folder)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    return save_open_clip(folder, siglip_config(str(folder)), preprocess)


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """timm's image tower, and a Hugging Face text tower pooled by the mean."""
    folder = save_bert(tmp_path_factory.mktemp("custom") / "model")
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "test_efficientnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_proj_type": None,
            "hf_pooler_type": "mean_pooler",
            "context_length": 32,
        },
    }
    (folder / "model.safetensors").unlink()  # open_clip would take it for its own checkpoint
    return save_open_clip(folder, config, {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})


@pytest.fixture(params=["clip", "siglip", "custom"])
def name(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size))
        for size in ((90, 60), (50, 200), (64, 64), (33, 31))
    ]


def reference(name, images, texts):
    """open_clip as its own documentation uses it, one item at a time."""
    model = open_clip.create_model(name).eval()
    tokenizer = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        pixels = [model.encode_image(image[None], normalize=True)[0].numpy() for image in images]
        words = [model.encode_text(tokenizer([text]), normalize=True)[0].numpy() for text in texts]
    return np.stack(pixels), np.stack(words), model.visual.preprocess_cfg


def test_vectors_are_open_clips(name, pictures):
    """Given the same pixels, to 1e-5; from its own Pillow transform, as near as the pixels are."""
    ours = OpenClip(name, device="cpu")
    prepared = [ours.prepare(picture) for picture in pictures]
    config = PreprocessCfg(**reference(name, [torch.zeros(3, *prepared[0].shape[:2])], ["x"])[2])
    transform = image_transform_v2(config, is_train=False)
    same_pixels, wanted_texts, _ = reference(name, [transform(Image.fromarray(image)) for image in prepared], TEXTS)
    own_pixels, _, _ = reference(name, [transform(Image.fromarray(picture)) for picture in pictures], ["x"])
    images = ours.encode(items_of([None] * 4, pictures))
    assert np.abs(images - same_pixels).max() < 1e-5
    assert (images * own_pixels).sum(axis=1).min() > 0.9999
    assert np.abs(ours.encode(items_of(TEXTS)) - wanted_texts).max() < 1e-5


def test_openclip_keeps_the_contract(name, pictures):
    items = items_of(
        [None, "a cat", None, "the dog sleeps " * 9, None, "", "both"], [pictures[0], None, pictures[1], None, pictures[2], None, pictures[3]]
    )
    check_encoder(OpenClip(name, device="cpu"), items, again=OpenClip(name, device="cpu"))


def test_bfloat16_stays_near_and_within_its_tolerance(name, pictures):
    check_half(name, pictures, "bfloat16")


def test_float16_stays_near_and_within_its_tolerance(clip, pictures):
    check_half(clip, pictures, "float16")


def check_half(name, pictures, dtype):
    items = items_of([None, None, "a cat", ""], [pictures[0], pictures[1], None, None])
    half = OpenClip(name, dtype=dtype, device="cpu")
    check_encoder(half, items)
    assert (half.encode(items) * OpenClip(name, device="cpu").encode(items)).sum(axis=1).min() > 0.999


def test_what_is_embedded_can_be_chosen(clip, pictures):
    both = items_of(["a cat", "a dog"], pictures[:2])
    auto, image, text = (OpenClip(clip, of=of, device="cpu") for of in ("auto", "image", "text"))
    assert np.allclose(auto.encode(both), image.encode(both))
    assert np.allclose(text.encode(both), auto.encode(items_of(["a cat", "a dog"])))
    with pytest.raises(ValueError, match=r"item-0.*no image"):
        image.encode(items_of(["a cat"]))
    assert image.for_queries().encode(items_of(["a cat"])).shape == (1, 16)


def test_a_name_and_a_checkpoint_file_are_a_model(clip, tmp_path, pictures):
    folder = clip.removeprefix("local-dir:")
    (tmp_path / "tiny-clip-test.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-clip-test.json")
    ours = OpenClip("tiny-clip-test", f"{folder}/open_clip_pytorch_model.bin", device="cpu")
    items = items_of(["a cat", None], [None, pictures[0]])
    assert np.allclose(ours.encode(items), OpenClip(clip, device="cpu").encode(items), atol=1e-6)
    with pytest.raises(ConfigError, match=r"is a folder; write local-dir:/"):
        OpenClip(folder)
    with pytest.raises(ConfigError, match="did you mean 'tiny-clip-test'"):
        OpenClip("tiny-clip-tset", "x")


def test_many_threads_load_the_weights_once(custom, monkeypatch, pictures):
    loads, real = [], open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: loads.append(1) or real(*args, **kwargs))
    ours = OpenClip(custom, device="cpu")
    items = items_of([*TEXTS, None], [None] * 4 + [pictures[0]])
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ours.encode, [items] * 8))
    assert len(loads) == 1
    assert all(np.abs(vectors - found[0]).max() < 1e-5 for vectors in found)


def test_dim_and_fingerprint_are_known_before_weights_load(clip, tmp_path, monkeypatch):
    folder = shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "model")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"no weights at all")
    ours = OpenClip(f"local-dir:{folder}", device="cpu")
    assert ours.dim == 16 and len(ours.fingerprint) == 32
    assert ours.prepare(np.zeros((50, 70, 3), np.uint8)).shape == (32, 32, 3)
    with pytest.raises(Exception, match=r"(?i)pickle|weights|load"):
        ours.load()


def test_a_tag_of_open_clip_has_a_fingerprint_without_a_download():
    first, other = OpenClip("ViT-B-32", "laion2b_s34b_b79k"), OpenClip("ViT-B-32", "datacomp_xl_s13b_b90k")
    assert first.dim == 512 and first.fingerprint != other.fingerprint
    assert OpenClip("ViT-B-16-SigLIP", "webli").dim == 768


def test_the_fingerprint_changes_with_what_changes_vectors_and_with_nothing_else(custom, tmp_path):
    folder = custom.removeprefix("local-dir:")
    first = OpenClip(custom).fingerprint
    for same in ({"device": "cpu"}, {"batch_size": 3}, {"dtype": "float32"}, {"of": "auto"}):
        assert OpenClip(custom, **same).fingerprint == first, same
    shutil.copytree(folder, tmp_path / "same")
    (tmp_path / "same" / "README.md").write_text("another text")
    assert OpenClip(f"local-dir:{tmp_path / 'same'}").fingerprint == first

    others = [OpenClip(custom, **other).fingerprint for other in ({"dtype": "bfloat16"}, {"of": "text"})]
    changes = [
        ("open_clip_config.json", lambda text: text.replace("mean_pooler", "max_pooler")),
        ("open_clip_config.json", lambda text: text.replace("0.5", "0.4")),
        ("tokenizer.json", lambda text: text.replace("house", "horse")),
    ]
    for number, (name, edit) in enumerate(changes):
        changed = shutil.copytree(folder, tmp_path / str(number))
        (changed / name).write_text(edit((changed / name).read_text()))
        others.append(OpenClip(f"local-dir:{changed}").fingerprint)
    changed = shutil.copytree(folder, tmp_path / "weights")
    state = torch.load(changed / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({**state, "logit_scale": state["logit_scale"] + 1}, changed / "open_clip_pytorch_model.bin")
    others.append(OpenClip(f"local-dir:{changed}").fingerprint)
    assert len({first, *others}) == len(others) + 1


def test_a_moved_text_tower_keeps_the_fingerprint(custom, tmp_path):
    """Its folder's path stands in open_clip's configuration; a table must not be refused because a disk has another name."""
    config = json.loads((tmp_path.parent / custom.removeprefix("local-dir:") / "open_clip_config.json").read_text())
    model = tmp_path / "model"
    moved = shutil.copytree(custom.removeprefix("local-dir:"), model)
    config["model_cfg"]["text_cfg"].update(hf_model_name=str(moved), hf_tokenizer_name=str(moved))
    (model / "open_clip_config.json").write_text(json.dumps(config))
    assert OpenClip(f"local-dir:{model}").fingerprint == OpenClip(custom).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-B-33", "pretrained": "openai"}, "did you mean 'ViT-B-32'"),
        ({"model": "ViT-B-32"}, "pretrained is required.*laion2b_s34b_b79k"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79"}, "did you mean 'laion2b_s34b_b79k'"),
        ({"model": "ViT-B-32", "pretrained": "openai"}, "use 'ViT-B-32-quickgelu'"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "dtype": "bf16"}, "dtype"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "of": "images"}, "'auto'"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "batch_size": 0}, "at least 1"),
        ({"model": "local-dir:/nowhere"}, "no open_clip model"),
        ({"model": "hf-hub:org/name", "pretrained": "x"}, "leave it out"),
    ],
)
def test_wrong_arguments_are_refused_with_the_right_ones(arguments, message):
    with pytest.raises(ConfigError, match=message):
        OpenClip(**arguments)


def test_a_hub_model_is_its_cached_commit(clip, tmp_path, monkeypatch):
    """As the hub's client lays its cache out, with the hub itself out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--org--tiny"
    shutil.copytree(clip.removeprefix("local-dir:"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    by_branch, by_commit = (OpenClip(f"hf-hub:org/tiny{at}", cache_dir=str(tmp_path), device="cpu") for at in ("", f"@{commit}"))
    assert by_branch.fingerprint == by_commit.fingerprint
    assert by_branch.lineage["weights"] == {"repo": "org/tiny", "commit": commit}
    items = items_of(["a cat"])
    assert np.allclose(by_branch.encode(items), OpenClip(clip, device="cpu").encode(items), atol=1e-6)
    with pytest.raises(ConfigError, match="pin a commit of 40 digits"):
        OpenClip("hf-hub:org/tiny@v2", cache_dir=str(tmp_path))
