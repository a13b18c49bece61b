"""Slides in an object store: tiles by ranges, or a copy in a bounded cache."""

import contextlib
import itertools
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest

from pipeline.slides import BadSlide, BadTile
from pipeline.slides.cache import SlideCache
from pipeline.slides.handles import Cache, Handles
from pipeline.slides.inventory import version_now
from pipeline.slides.opening import open_slide
from pipeline.slides.ranges import StoredObject
from pipeline.stores import CredentialsRefused
from tests.slides.build import drawn_textures, render, some_scene, write_svs, write_tiff, zero_tile
from tests.slides.slow import slow_store

BUCKET = "slides"


@pytest.fixture(scope="module")
def s3(s3_server):
    """A real S3 server with a bucket; gives the client and fsspec's storage options."""
    client, options = s3_server
    client.create_bucket(Bucket=BUCKET)
    return client, options


@pytest.fixture(scope="module")
def image():
    """Two drawn blobs, 2048 x 1536 px."""
    textures = drawn_textures()
    return render(some_scene(list(textures), width_um=1024, height_um=768), textures, mpp=0.5).image


@pytest.fixture(scope="module")
def svs(image, tmp_path_factory):
    """The image as SVS; of the best quality, so that a tile is a small part of it."""
    return write_svs(tmp_path_factory.mktemp("svs") / "slide.svs", image, quality=100)


@pytest.fixture(scope="module")
def deflated(image, tmp_path_factory):
    """A part of the image that the fast reader cannot read."""
    return write_tiff(tmp_path_factory.mktemp("deflated") / "slide.tiff", image[:512, :512], compression="deflate")


def put(s3, path, key):
    s3[0].upload_file(str(path), BUCKET, key)
    return f"s3://{BUCKET}/{key}"


def test_ranges_fetch_a_small_part_of_the_file(s3, svs, monkeypatch):
    fetched = []
    read = StoredObject.read

    def counted(self, offset, length):
        data = read(self, offset, length)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(StoredObject, "read", counted)
    uri, local = put(s3, svs, "slide.svs"), open_slide(str(svs))
    slide = open_slide(uri, storage_options=s3[1])
    assert slide.info.content_fp == local.info.content_fp
    assert (slide.info.levels, slide.info.mpp) == (local.info.levels, local.info.mpp)
    assert "cannot be asked" in " ".join(slide.info.notes)
    opening = sum(fetched)
    assert len(fetched) < 20
    fetched.clear()
    for place, level in [((512, 512), 0), ((600, 700), 0), ((0, 0), 2)]:
        assert np.array_equal(slide.read(place, level=level, size=(200, 200)), local.read(place, level=level, size=(200, 200)))
    # Stored tiles, each by one request; of the second region one is still held, and others may be of the opening.
    assert 3 <= len(fetched) <= 1 + 3 + 1
    assert opening + sum(fetched) < svs.stat().st_size / 4


def test_a_damaged_tile_in_a_store_is_a_bad_tile(s3, svs, tmp_path):
    path = shutil.copy(svs, tmp_path / "bad.svs")
    zero_tile(path, (512, 512))
    slide = open_slide(put(s3, path, "bad.svs"), storage_options=s3[1])
    with pytest.raises(BadTile):
        slide.read((512, 512), level=0, size=(256, 256))
    assert slide.read((0, 0), level=0, size=(256, 256)).any()


def test_what_is_not_there_or_empty_in_a_store_says_so(s3):
    s3[0].put_object(Bucket=BUCKET, Key="empty.svs", Body=b"")
    s3[0].put_object(Bucket=BUCKET, Key="text.svs", Body=b"not a slide")
    for key, reason in [("gone.svs", "missing"), ("empty.svs", "empty"), ("text.svs", "unsupported")]:
        with pytest.raises(BadSlide) as raised:
            open_slide(f"s3://{BUCKET}/{key}", storage_options=s3[1])
        assert raised.value.reason == reason


def test_refused_credentials_are_no_slides_fault():
    """They are the same PermissionError as one forbidden slide, and every slide of the store became `missing`."""
    with forbidding(b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>no</Message></Error>") as options:
        with pytest.raises(CredentialsRefused, match="ExpiredToken"):
            open_slide("s3://bucket/a.svs", storage_options=options)
        with pytest.raises(CredentialsRefused, match="ExpiredToken"):
            version_now("s3://bucket/a.svs", options)
    with forbidding(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>") as options:
        with pytest.raises(BadSlide, match="missing"):
            open_slide("s3://bucket/a.svs", storage_options=options)
        with pytest.raises(PermissionError):
            version_now("s3://bucket/a.svs", options)


@contextlib.contextmanager
def forbidding(body):
    """A store that forbids everything, and says why in `body` where HTTP lets it."""

    class Forbids(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *said):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Forbids)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def test_what_ranges_do_not_serve_is_read_from_the_cache(s3, deflated, tmp_path):
    uri, cache = put(s3, deflated, "deflated.tiff"), SlideCache(tmp_path / "cache", max_bytes=10**8)
    with pytest.raises(BadSlide, match="give a cache folder"):
        open_slide(uri, storage_options=s3[1])
    slide = open_slide(uri, storage_options=s3[1], cache=cache)
    local = open_slide(str(deflated))
    assert slide.info.content_fp == local.info.content_fp
    assert np.array_equal(slide.read((10, 20), level=0, size=(99, 77)), local.read((10, 20), level=0, size=(99, 77)))
    slide.close()
    (copy,) = cache.folder.glob("*/deflated.tiff")
    copied = copy.stat().st_mtime_ns
    open_slide(uri, storage_options=s3[1], cache=cache).close()
    assert copy.stat().st_mtime_ns == copied


def test_a_slide_that_was_replaced_is_copied_anew(s3, image, tmp_path):
    cache = SlideCache(tmp_path / "cache", max_bytes=10**8)
    uri = put(s3, write_tiff(tmp_path / "x.tiff", image[:512, :512], compression="deflate"), "replaced.tiff")
    first = open_slide(uri, storage_options=s3[1], cache=cache).info.content_fp
    put(s3, write_tiff(tmp_path / "x.tiff", image[512:1024, :512], compression="deflate"), "replaced.tiff")
    assert open_slide(uri, storage_options=s3[1], cache=cache).info.content_fp != first


def test_the_cache_removes_what_was_not_used_for_longest_and_never_what_is_in_use(s3, deflated, tmp_path):
    size = deflated.stat().st_size
    cache = SlideCache(tmp_path / "cache", max_bytes=int(2.5 * size))
    uris = [put(s3, deflated, f"lru-{i}.tiff") for i in range(3)]
    kept = open_slide(uris[0], storage_options=s3[1], cache=cache)
    open_slide(uris[1], storage_options=s3[1], cache=cache).close()
    open_slide(uris[2], storage_options=s3[1], cache=cache).close()
    assert sorted(path.name for path in cache.folder.glob("*/*.tiff")) == ["lru-0.tiff", "lru-2.tiff"]
    assert kept.read((0, 0), level=0, size=(64, 64)).any()
    with pytest.raises(BadSlide) as raised:
        open_slide(uris[1], storage_options=s3[1], cache=SlideCache(tmp_path / "small", max_bytes=size - 1))
    assert raised.value.reason == "too_large"


def test_a_full_cache_waits_until_a_slide_is_closed(s3, deflated, tmp_path):
    cache = SlideCache(tmp_path / "cache", max_bytes=int(1.5 * deflated.stat().st_size))
    uris = [put(s3, deflated, f"wait-{i}.tiff") for i in range(2)]
    first = open_slide(uris[0], storage_options=s3[1], cache=cache)
    second = []
    thread = threading.Thread(target=lambda: second.append(open_slide(uris[1], storage_options=s3[1], cache=cache)))
    thread.start()
    time.sleep(0.5)
    assert not second
    first.close()
    thread.join(20)
    assert second


def test_an_idle_slide_gives_its_room_to_one_that_is_opened(deflated, tmp_path):
    """A worker that kept idle slides open waited ten minutes for the room that they had, and then called the new one too large."""
    told = open_slide(str(deflated)).info
    rows = []
    for name in "abc":
        fsspec.filesystem("memory").put_file(str(deflated), f"/idle/{name}.tiff")
        rows.append({"id": f"memory://idle/{name}.tiff", "content_fp": told.content_fp, "reader": told.reader})
    handles = Handles(Cache(folder=str(tmp_path), max_gb=1.5e-9 * deflated.stat().st_size), None)
    with handles.hold(rows[0]) as first:
        pass
    with handles.hold(rows[0]) as again:
        assert again is first, "it stays open as long as nothing else is opened"
    opened = []

    def open_third():
        with handles.hold(rows[2]) as third:
            opened.append(third.read((0, 0), level=0, size=(9, 9)).shape)

    with handles.hold(rows[1]) as second:
        waits = threading.Thread(target=open_third)
        waits.start()
        time.sleep(0.7)
        assert not opened
        assert second.read((0, 0), level=0, size=(9, 9)).any(), "never what is in use"
    waits.join(20)
    assert opened == [(9, 9, 4)]


TAKE = """
import sys
from pipeline.slides.cache import SlideCache
for _ in range(20):
    entry = SlideCache(sys.argv[1], max_bytes=10**8).hold(sys.argv[2], {})
    print(entry.path.stat().st_size, entry.path.stat().st_mtime_ns)
    entry.release()
"""


def test_two_processes_copy_a_slide_once(deflated, tmp_path):
    """By a store that needs no server: what counts is the cache."""
    command = [sys.executable, "-c", TAKE, str(tmp_path / "cache"), deflated.as_uri()]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seen = [line for worker in workers for line in worker.communicate(timeout=60)[0].splitlines()]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(seen) == 40
    assert len(set(seen)) == 1
    assert seen[0].startswith(f"{deflated.stat().st_size} ")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_who_waits_for_a_copy_has_it_while_the_one_who_made_it_reads(deflated, tmp_path):
    """It wanted the slide's lock for itself, and waited until the other had read all of the slide."""
    for attempt in range(20):
        cache = SlideCache(tmp_path / str(attempt), max_bytes=10**8)
        with ThreadPoolExecutor(3) as threads:
            held = [threads.submit(cache.hold, deflated.as_uri(), {}) for _ in range(3)]
            entries = [each.result(timeout=20) for each in held]
        assert len({entry.path for entry in entries}) == 1
        for entry in entries:
            entry.release()


def test_who_waits_for_a_slow_copy_hears_that_it_gets_on_and_not_when_it_stalls(deflated, tmp_path):
    def copy(url, name):
        heard = []
        caches = [SlideCache(tmp_path / name, max_bytes=10**8, alive=lambda: heard.append(time.monotonic())) for _ in range(2)]
        started = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            entries = list(threads.map(lambda cache: cache.hold(f"{url}/{deflated.name}", {}), caches))
        assert {entry.path.read_bytes() for entry in entries} == {deflated.read_bytes()}
        times = [started, *sorted(heard), time.monotonic()]
        return len(heard), max(b - a for a, b in itertools.pairwise(times))

    with slow_store(deflated.parent, seconds=2) as url:
        heard, longest = copy(url, "gets-on")
    assert heard >= 8, "both hear of it"
    assert longest < 1
    with slow_store(deflated.parent, seconds=2, stalls=True) as url:
        heard, longest = copy(url, "stalls")
    assert longest > 1.5


def test_half_a_removal_leaves_no_slide_and_takes_room_until_it_is_gone(s3, deflated, tmp_path, monkeypatch):
    """A process that was killed while it made room left what it had not removed yet, and the next reader took it for the whole slide."""
    size = deflated.stat().st_size
    cache = SlideCache(tmp_path / "cache", max_bytes=int(1.5 * size))
    uris = [put(s3, deflated, f"half-{i}.tiff") for i in range(3)]
    open_slide(uris[0], storage_options=s3[1], cache=cache).close()
    [first] = [path.name for path in cache.folder.iterdir() if path.is_dir()]

    def killed(folder, **how):
        if (folder / ".size").exists():
            (folder / ".size").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        open_slide(uris[1], storage_options=s3[1], cache=cache)
    assert not (cache.folder / first).exists()
    open_slide(uris[1], storage_options=s3[1], cache=cache).close()
    assert len([path for path in cache.folder.iterdir() if path.is_dir()]) == 1, "what was left is gone too"


def test_what_a_killed_copy_left_behind_is_no_slide(s3, deflated, tmp_path):
    uri, cache = put(s3, deflated, "killed.tiff"), SlideCache(tmp_path / "cache", max_bytes=int(1.5 * deflated.stat().st_size))
    open_slide(uri, storage_options=s3[1], cache=cache).close()
    (whole,) = [path for path in cache.folder.iterdir() if path.is_dir()]
    part = whole.rename(whole.with_suffix(".part"))
    (part / "killed.tiff").write_bytes(b"half")
    slide = open_slide(uri, storage_options=s3[1], cache=cache)
    assert slide.read((0, 0), level=0, size=(64, 64)).any()
    assert not part.exists()
