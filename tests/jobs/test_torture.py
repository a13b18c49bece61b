"""2,000 images, 4 of them broken and 6 unusual, through the command line: every row is right by value, every loss has a reason."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from pipeline.readers.identity import digests
from pipeline.table.at import TableAt

NUM = 2000
SIZE = (48, 32)
BROKEN = {"broken-big.png": "too_many_pixels", "broken-cut.jpg": "corrupt_image", "broken-empty.jpg": "empty", "broken-text.jpg": "not_an_image"}
WHITE = (255, 255, 255)


def quadrants(colours, size=SIZE):
    """An image of four plain quadrants: top left, top right, bottom left, bottom right."""
    width, height = size
    pixels = np.zeros((height, width, len(colours[0])), np.uint8)
    halves = [(slice(None, height // 2), slice(height // 2, None)), (slice(None, width // 2), slice(width // 2, None))]
    for index, colour in enumerate(colours):
        pixels[halves[0][index // 2], halves[1][index % 2]] = colour
    return Image.fromarray(pixels, "RGBA" if len(colours[0]) == 4 else "RGB")


def encoded(image, kind, **options):
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def unusual(dice):
    """File name to its bytes and the colours of the four quadrants that must be seen."""
    a, b = dice.integers(20, 235, (2, 4, 3)).tolist()
    grey = [10, 90, 170, 250]
    palette = quadrants(a).quantize(8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    levels = np.repeat(np.repeat(np.array(grey, np.uint16).reshape(2, 2) * 257, 16, axis=0), 24, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture is turned a quarter to the left
    turned = quadrants(a, (32, 48)).transpose(Image.Transpose.ROTATE_90)
    plain = {"quality": 95, "subsampling": 0}
    return {
        "odd-cmyk.jpg": (encoded(quadrants(a).convert("CMYK"), "JPEG", **plain), a),
        "odd-grey16.png": (encoded(Image.fromarray(levels), "PNG"), [[g] * 3 for g in grey]),
        "odd-palette.png": (encoded(palette, "PNG"), [WHITE, *a[1:]]),
        "odd-animated.gif": (encoded(quadrants(a), "GIF", save_all=True, append_images=[quadrants(b)], duration=50), a),
        "odd-exif.jpg": (encoded(turned, "JPEG", exif=exif, **plain), a),
        "odd-webp.webp": (encoded(quadrants(a), "WEBP", lossless=True), a),
    }


def bomb(side=30_000):
    """A true PNG of side x side black pixels, one bit each, in 110 kB."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + side // 8) * 1000) for _ in range(side // 1000)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The folder, and what each good file must look like."""
    folder = tmp_path_factory.mktemp("images")
    dice = np.random.default_rng(0)
    odd = unusual(dice)
    ordinary = {f"photo-{i:04}.png": dice.integers(0, 256, (4, 3)).tolist() for i in range(NUM - len(odd) - len(BROKEN))}
    for name, colours in ordinary.items():
        (folder / name).write_bytes(encoded(quadrants(colours), "PNG", compress_level=1))
    for name, (data, _) in odd.items():
        (folder / name).write_bytes(data)
    whole = encoded(quadrants(dice.integers(0, 256, (4, 3)).tolist()), "JPEG")
    broken = {"broken-big.png": bomb(), "broken-cut.jpg": whole[: len(whole) * 2 // 3], "broken-empty.jpg": b"", "broken-text.jpg": b"no picture\n"}
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    return folder, ordinary | {name: colours for name, (_, colours) in odd.items()}


def embed(tmp_path, folder, *overrides):
    """Exit status, report and messages of the command."""
    job = {
        "source": {"target": "pipeline.readers.images:Images", "args": {"uri": str(folder)}},
        "encoder": {"target": "tests.sources:Quadrants"},
        "table": {"uri": str(tmp_path / "db"), "name": "t", "thumbnail_px": 24},
        "compute": {"cpus": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "jobs.embed", str(tmp_path / "job.yaml"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def rows(tmp_path):
    found = TableAt(uri=str(tmp_path / "db"), name="t").require().to_table(columns=["id", "uri", "vector", "thumbnail"]).to_pylist()
    assert len(found) == len({row["id"] for row in found}), "an id stands twice"
    return {Path(row["uri"]).name: row for row in found}


def check_rows(found, expected):
    """Each row shows the picture that is in its file: the quadrants' colours in the vector and in the thumbnail."""
    for name, row in found.items():
        assert row["id"] == digests(pa.array([row["uri"]]))[0].as_py()
        vector = np.array(row["vector"])
        seen = vector[:12].reshape(4, 3) / vector[12] * 255
        np.testing.assert_allclose(seen, expected[name], atol=0.01 if name.endswith(("png", "gif", "webp")) else 5, err_msg=name)
        small = Image.open(io.BytesIO(row["thumbnail"]))
        assert small.size == ((16, 24) if name == "odd-exif.jpg" else (24, 16)), name
        width, height = small.size
        # The middles of the quadrants: a JPEG's colours run into each other at the borders.
        middles = [small.crop((x - 3, y - 2, x + 3, y + 2)) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
        np.testing.assert_allclose([np.asarray(part).mean(axis=(0, 1)) for part in middles], expected[name], atol=12, err_msg=name)


def test_everything_decodable_is_embedded_rightly_and_the_rest_are_rejects_with_their_reasons(tmp_path, images):
    folder, expected = images
    status, report, _ = embed(tmp_path, folder)
    assert status == 0
    assert (report["listed"], report["written"], report["rejected"], report["failed"]) == (NUM, NUM - 4, 4, 0)
    assert report["rejects"] == dict.fromkeys(BROKEN.values(), 1)
    found = rows(tmp_path)
    assert found.keys() == expected.keys()
    check_rows(found, expected)
    rejects = TableAt(uri=str(tmp_path / "db"), name="t").open(".rejects").to_table().to_pylist()
    assert {Path(row["uri"]).name: row["reason"] for row in rejects} == BROKEN
    assert all(row["detail"] for row in rejects)


def test_too_many_rejects_exit_1_and_leave_a_table_that_a_later_run_completes(tmp_path, images):
    folder, expected = images
    status, report, messages = embed(tmp_path, folder, "limits.max_rejects=0.001")
    assert (status, report["status"]) == (1, "failed")
    assert f"of {NUM} items are rejected" in messages
    assert "limits.max_rejects=0.001" in messages
    assert report["listed"] == NUM == report["written"] + report["rejected"] + report["failed"]
    partly = rows(tmp_path)
    assert len(partly) == report["written"] == report["rows_in_table"]
    check_rows(partly, expected)
    status, report, _ = embed(tmp_path, folder)
    assert (status, report["rejected"], report["failed"], report["rows_in_table"]) == (0, 4, 0, NUM - 4)
    assert report["unchanged"] + report["written"] == NUM - 4
    found = rows(tmp_path)
    assert found.keys() == expected.keys()
    assert all(found[name] == row for name, row in partly.items())
    check_rows(found, expected)
