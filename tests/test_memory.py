"""What a worker may hold, as `pipeline.compute` states it: measured in a process of its own, on large images and on bombs."""

import gzip
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

MIB = 2**20


def grown(tmp_path, source, *, target, encoder="pipeline.encoders.hashing:Hashing", threads=1, limits=None, **args):
    """What a worker made of a source, and by how many bytes its process grew at its peak."""
    job = {
        "source": {"target": f"pipeline.readers.{target}", "args": {"uri": str(source), **args}},
        "encoder": {"target": encoder},
        "table": {"uri": str(tmp_path / "db"), "name": "t", "thumbnail_px": 128},
        "compute": {"threads": threads},
        "limits": limits or {},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "tests.peak", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_twenty_images_of_36_megapixels_stay_within_the_stated_memory(tmp_path):
    """They failed: sixteen at a time went to an encoder that takes whole images, and are more than a column can hold."""
    folder, threads, pixels = tmp_path / "images", 2, 6000 * 6000
    folder.mkdir()
    small = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(small).resize((6000, 6000)).save(folder / "00.jpg")
    for i in range(1, 20):
        (folder / f"{i:02}.jpg").hardlink_to(folder / "00.jpg")
    found = grown(tmp_path, folder, target="images:Images", encoder="tests.sources:Quadrants", threads=threads)
    assert (found["rows"], found["errors"]) == (20, [])
    fetched = 16 * (folder / "00.jpg").stat().st_size
    a_thread = fetched + (7 + 3) * pixels + 2 * max(128 * MIB, 3 * pixels)
    rest = 200 * MIB  # libraries that are loaded on the way, and the chunk's rows
    assert found["grown"] <= threads * a_thread + rest, f"grew by {found['grown'] / MIB:.0f} MiB"
    assert found["grown"] > threads * 3 * pixels, "the images cannot have been decoded"


def test_a_line_of_half_a_gigabyte_in_a_small_gzip_file_costs_a_window(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"id": "a", "text": "hello"}\n{"id": "b", "text": "')
        for _ in range(32):
            file.write(bytes(16 * MIB))
        file.write(b'"}\n{"id": "c", "text": "bye"}\n')
    found = grown(tmp_path, tmp_path / "a.jsonl.gz", target="jsonl:JsonLines", id="id", text="text")
    assert (found["rows"], found["rejects"], found["errors"]) == (2, {"too_many_bytes": 1}, [])
    assert found["grown"] <= (3 * 64 + 200) * MIB


def test_a_quote_that_is_never_closed_costs_its_line_and_a_bounded_window(tmp_path):
    with (tmp_path / "a.csv").open("wb") as file:
        file.write(b'id,text,notes\n1,hello,\n2,"open,\n')
        for i in range(80):
            # One character in four bytes makes Python hold all of them so: the dearest that a text can be.
            file.write(b"%d,hello," % (10 + i) + "\U0001f600".encode() + b"x" * MIB + b"\n")
    found = grown(tmp_path, tmp_path / "a.csv", target="csv:Csv", id="id", text="text")
    assert (found["rows"], found["rejects"], found["errors"]) == (81, {"bad_row": 1}, [])
    assert 2 * 64 * MIB < found["grown"] <= 16 * 64 * MIB


@pytest.mark.parametrize("whole", [True, False], ids=["sparse", "cut short"])
def test_a_tar_member_that_claims_ten_gigabytes_is_stepped_over(tmp_path, whole):
    size = 10 * 2**30

    def header(name, size):
        entry = tarfile.TarInfo(name)
        entry.size = size
        return entry.tobuf(tarfile.GNU_FORMAT)

    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header("a.txt", 5) + b"hello".ljust(512, b"\0") + header("b.txt", size))
        if whole:
            file.seek(size, 1)
            file.write(header("c.txt", 3) + b"bye".ljust(512, b"\0") + bytes(1024))
    found = grown(tmp_path, tmp_path / "a.tar", target="webdataset:WebDataset", image=None)
    assert (found["rows"], found["rejects"], found["errors"]) == (2 if whole else 1, {"too_many_bytes" if whole else "unreadable": 1}, [])
    assert found["grown"] <= 200 * MIB


def test_an_image_in_a_container_is_held_to_the_limit_and_a_giant_value_is_its_rows_fault(tmp_path):
    images = pa.array([b"x" * 200, bytes(70 * MIB)], pa.large_binary())
    pq.write_table(pa.table({"id": ["small", "giant"], "image": images}), tmp_path / "a.parquet")
    limits = {"max_item_bytes": 100}
    found = grown(
        tmp_path, tmp_path / "a.parquet", target="parquet:Parquet", encoder="tests.sources:Quadrants", limits=limits, id="id", image="image"
    )
    assert (found["rows"], found["rejects"], found["errors"]) == (0, {"too_many_bytes": 2}, [])
    assert 2 * 70 * MIB < found["grown"] <= (4 * 70 + 200) * MIB
