"""ConSE: real weights, real photographs, results that anyone can see are right."""

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.encoders.conse import ConSE, class_names, in_order
from pipeline.encoders.sentence import Sentence
from pipeline.testing import check_encoder
from tests.encoders.models import items_of


@pytest.fixture(scope="module")
def paths(assets):
    return str(assets / "encoder" / "classifier.pth"), str(assets / "encoder" / "sentence")


@pytest.fixture(scope="module")
def encoder(paths):
    return ConSE(*paths, device="cpu")


@pytest.fixture(scope="module")
def gallery(encoder, photos):
    rows, images = photos
    return rows, encoder.encode(items_of([None] * len(images), images))


def test_conse_keeps_the_contract(encoder, paths, mixed_items):
    check_encoder(encoder, mixed_items, again=ConSE(*paths))


@pytest.mark.parametrize(
    ("query", "file"),
    [
        ("a cat", "chelsea.png"),
        ("a cup of coffee", "coffee.png"),
        ("a motorbike", "motorcycle_left.png"),
        ("a rocket", "rocket.jpg"),
        ("fruit", "imagenet_04_949.jpg"),
        ("a chair to sit on", "imagenet_01_559.jpg"),
        ("a photographer", "camera.png"),
        ("geese", "imagenet_15_99.jpg"),
    ],
)
def test_a_query_finds_its_photo(encoder, gallery, query, file):
    rows, vectors = gallery
    scores = vectors @ encoder.for_queries().encode(items_of([query]))[0]
    assert rows[int(scores.argmax())]["filepath"] == file


def test_titles_find_their_photos(encoder, gallery):
    """Measured: 0.81 first, 0.92 among the first three, of 37."""
    rows, vectors = gallery
    scores = encoder.encode(items_of([row["title"] for row in rows])) @ vectors.T
    ranks = (scores > scores.diagonal()[:, None]).sum(axis=1)
    assert (ranks == 0).mean() >= 0.75
    assert (ranks < 3).mean() >= 0.88


def test_images_are_what_the_paper_says(encoder, photos):
    """Equation 3, written out: the vectors of the likeliest classes, weighted by their probability."""
    _, images = photos
    loaded = encoder._loaded()
    pixels = torch.from_numpy(encoder.prepare(images[23])).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        shares = torch.softmax(loaded.network(pixels)[0] / 2.0, dim=0).numpy()
    classes_CD = loaded.classes_CD.numpy()
    wanted = sum(shares[index] * classes_CD[index] for index in np.argsort(-shares)[:20])
    found = encoder.encode(items_of([None], [images[23]]))[0]
    assert np.abs(found - wanted / np.linalg.norm(wanted)).max() < 1e-5


def test_classes_are_the_vectors_of_their_names_around_their_mean(encoder, paths):
    classes_CD, some = encoder._loaded().classes_CD.numpy(), [0, 281, 967, 999]
    names = Sentence(paths[1], device="cpu").encode_texts([class_names()[index] for index in some])
    assert np.abs(classes_CD.mean(axis=0)).max() < 1e-6
    assert np.abs((classes_CD[some] - classes_CD[0]) - (names - names[0])).max() < 1e-5


def test_bfloat16_stays_near(encoder, paths, mixed_items):
    """Measured cosines to float32: texts at least 0.9999, images at least 0.9896."""
    half = ConSE(*paths, dtype="bfloat16", device="cpu")
    vectors = half.encode(mixed_items)
    assert (vectors * encoder.encode(mixed_items)).sum(axis=1).min() > 0.98
    alone = np.concatenate([half.encode(mixed_items.slice(row, 1)) for row in range(mixed_items.num_rows)])
    assert np.abs(alone - vectors).max() <= half.tolerance


def test_the_fingerprint_changes_with_each_setting(encoder, paths, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"other weights")
    others = [ConSE(*paths, **change) for change in ({"temperature": 1.0}, {"top": 10}, {"top": None}, {"dtype": "bfloat16"})]
    others += [ConSE(*paths, architecture="efficientnet_lite0"), ConSE(str(tmp_path / "other.pth"), paths[1])]
    assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    assert ConSE(*paths, batch_size=3, device="cpu").fingerprint == encoder.fingerprint


def test_wrong_arguments_are_refused(paths):
    with pytest.raises(ConfigError, match=r"python -m demo\.assets"):
        ConSE("/nowhere/classifier.pth", paths[1])
    with pytest.raises(ConfigError, match="did you mean 'tf_efficientnet_lite0'"):
        ConSE(*paths, architecture="tf_eficientnet_lite0")
    with pytest.raises(ConfigError, match="top=0"):
        ConSE(*paths, top=0)
    with pytest.raises(ConfigError, match="temperature=0"):
        ConSE(*paths, temperature=0)


def test_weights_of_another_architecture_are_refused():
    wanted = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    assert list(in_order({"x": torch.ones(2, 3), "y": torch.ones(4)}, wanted, "file")) == ["a", "b"]
    with pytest.raises(ConfigError, match="1 tensors, the architecture has 2"):
        in_order({"x": torch.ones(2, 3)}, wanted, "file")
    with pytest.raises(ConfigError, match=r"y is \(5,\), the architecture's b is \(4,\)"):
        in_order({"x": torch.ones(2, 3), "y": torch.ones(5)}, wanted, "file")
