import contextlib
import os
import pickle
import socket
import threading
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.config import ConfigError
from pipeline.fetch import fetch, open_file
from pipeline.media import BadItem
from pipeline.storage import FOUND, canonical, find, source_name
from pipeline.stores import CredentialsRefused

ODD_NAMES = ["a b.jpg", "ü€𝄞.jpg", "50%25 #1?.jpg", "[x] *.jpg", "a::b.jpg", "q'uo\"te.jpg", "new\nline.jpg"]


@pytest.fixture(scope="module")
def s3(s3_server):
    """A real S3 server with the bucket `bucket`; gives the client and fsspec's storage options."""
    client, options = s3_server
    client.create_bucket(Bucket="bucket")
    return client, options


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def units(*args, **kwargs):
    table = find(*args, **kwargs)
    assert table.schema.equals(FOUND)
    assert table["unit"].to_pylist() == sorted(table["unit"].to_pylist())
    return table["unit"].to_pylist()


def test_a_folder_is_listed_at_any_depth_without_hidden_files(tmp_path):
    fill(tmp_path, ["b.jpg", "a/c.JPG", "a/deep/d.png", "a/_DSC1.jpg", ".hidden.jpg", ".git/x.jpg", "_SUCCESS", "_temporary/0/y.jpg", "notes.txt"])
    expected = ["a/_DSC1.jpg", "a/c.JPG", "a/deep/d.png", "b.jpg"]
    assert units(str(tmp_path), suffixes=[".jpg", ".png"]) == [str(tmp_path / name) for name in expected]
    assert units(f"file://{tmp_path}/", suffixes=[".jpg", ".png"]) == [str(tmp_path / name) for name in expected]
    assert len(units(str(tmp_path))) == 5


def test_globs_files_and_lists_of_places(tmp_path, monkeypatch):
    fill(tmp_path, ["2023/a.jpg", "2024-1/b.jpg", "2024-2/c.jfif", "2024-2/deep/d.jpg"])
    monkeypatch.chdir(tmp_path)
    here = lambda *names: [str(tmp_path / name) for name in names]  # noqa: E731
    assert units("2024-*", suffixes=[".jpg"]) == here("2024-1/b.jpg", "2024-2/deep/d.jpg")
    assert units("**/*.jpg", suffixes=[".png"]) == here("2023/a.jpg", "2024-1/b.jpg", "2024-2/deep/d.jpg")
    assert units("2024-2/*.jfif", suffixes=[".jpg"]) == here("2024-2/c.jfif")
    assert units("2024-2/c.jfif", suffixes=[".jpg"]) == here("2024-2/c.jfif")
    assert units(["2023", "2024-1/b.jpg", "./2023/../2023/a.jpg"]) == here("2023/a.jpg", "2024-1/b.jpg")


def test_odd_names_are_listed_and_read(tmp_path):
    fill(tmp_path, ODD_NAMES)
    found = units(str(tmp_path))
    assert {os.path.basename(unit) for unit in found} == set(ODD_NAMES)
    assert fetch(found, max_bytes=1000) == [os.path.basename(unit).encode() for unit in found]
    for unit in found:
        assert units(unit) == [unit]


def test_the_version_changes_with_the_file_and_only_then(tmp_path):
    fill(tmp_path, ["a", "b"])
    before = find(str(tmp_path))
    assert find(str(tmp_path)).equals(before)
    assert before["bytes"].to_pylist() == [1, 1]
    (tmp_path / "a").write_bytes(b"z")
    os.utime(tmp_path / "a", ns=(1, 1))
    after = find(str(tmp_path))
    assert after["version"][0] != before["version"][0]
    assert after["version"][1] == before["version"][1]


def test_links_are_followed_once_and_loops_end(tmp_path):
    fill(tmp_path, ["data/a.jpg", "other/b.jpg"])
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/self.jpg").symlink_to(tmp_path / "data/self.jpg")
    (tmp_path / "data/broken.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "data/one").symlink_to(tmp_path / "other")
    (tmp_path / "data/two").symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / "data/pipe.jpg")
    found = units(str(tmp_path / "data"))
    assert found == [str(tmp_path / "data" / name) for name in ["a.jpg", "broken.jpg", "one/b.jpg", "self.jpg"]]
    results = fetch(found, max_bytes=1000)
    assert [getattr(result, "reason", result) for result in results] == [b"data/a.jpg", "missing", b"other/b.jpg", "missing"]


def test_a_missing_path_names_the_nearest_that_exists(tmp_path):
    fill(tmp_path, ["photos/a.jpg"])
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'photos'\?"):
        find(str(tmp_path / "phtos"))
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'photos'\?"):
        find(str(tmp_path / "phtos/2024/summer"))
    with pytest.raises(ConfigError, match=f"the nearest folder that does is {tmp_path}"):
        find(str(tmp_path / "zzzzz"))
    with pytest.raises(ConfigError, match="no file matches"):
        find(str(tmp_path / "*.jpg"))
    for nothing in ("", []):
        with pytest.raises(ConfigError, match="uri is empty"):
            find(nothing)


def test_an_empty_folder_says_what_was_looked_for_and_what_is_there(tmp_path):
    with pytest.raises(ConfigError, match="has no files; fill it"):
        find(str(tmp_path), suffixes=[".jpg"])
    fill(tmp_path, ["a.tif", "b.tif", "notes.txt"])
    with pytest.raises(ConfigError, match=r"no files ending in \.jpg, \.png; it holds 2 \.tif, 1 \.txt"):
        find(str(tmp_path), suffixes=[".jpg", ".png"])


def test_a_missing_package_and_an_unknown_store_say_what_to_do():
    with pytest.raises(ConfigError, match=r"pip install 'tessera\[gcs\]'"):
        find("gs://bucket/photos")
    with pytest.raises(ConfigError, match=r"unknown store 's3b'; did you mean 's3a?'\?"):
        find("s3b://bucket/photos")


def test_a_name_that_is_not_utf8_costs_itself_only(tmp_path):
    """It ended the run."""
    fill(tmp_path, ["a.jpg", "d.jpg"])
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    found = find(str(tmp_path), suffixes=[".jpg"])
    assert found["unit"].to_pylist() == [f"{tmp_path}/{name}" for name in ("a.jpg", "caf\\xe9.jpg", "d.jpg")]
    assert found["version"][1].as_py() == "not-utf8"
    [_, missing, _] = fetch(found["unit"].to_pylist(), max_bytes=100)
    assert missing.reason == "missing" and missing.detail.endswith("if its name is not UTF-8, rename it")


def refusing(monkeypatch, module, name, folder, error):
    """Let a module's listing fail in one folder: root, as whom tests may run, may read everything."""
    listed = getattr(module, name)

    def raising(*args, **kwargs):
        if str(args[-1]).rstrip("/") == folder:
            raise error
        return listed(*args, **kwargs)

    monkeypatch.setattr(module, name, raising)


@pytest.mark.parametrize("pattern", ["", "/*/*.jpg", "/**/*.jpg", "/[ab]"])
def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch, pattern):
    """A pattern stepped over it, and its files were called gone."""
    fill(tmp_path, ["a/1.jpg", "b/2.jpg"])
    error = PermissionError(13, "Permission denied", f"{tmp_path}/b")
    refusing(monkeypatch, os, "scandir", f"{tmp_path}/b", error)
    with pytest.raises(ConfigError, match="b may not be read by this user"):
        find(str(tmp_path) + pattern)


@pytest.mark.parametrize("pattern", ["", "/*/*.jpg", "/**/*.jpg"])
@pytest.mark.parametrize("error", [PermissionError("no"), OSError("lost the connection")])
def test_a_folder_that_a_store_does_not_list_is_named(monkeypatch, pattern, error):
    """fsspec's walks leave it out."""
    store = MemoryFileSystem()
    for name in ("a/1.jpg", "b/2.jpg"):
        store.pipe(f"/refusing/{name}", b"x")
    monkeypatch.setattr(MemoryFileSystem, "find", AbstractFileSystem.find)
    assert find(f"memory://refusing{pattern}").num_rows == 2
    refusing(monkeypatch, MemoryFileSystem, "ls", "/refusing/b", error)
    with pytest.raises(ConfigError, match=r"memory://(.*/)?refusing/b(: forbidden| cannot be reached)"):
        find(f"memory://refusing{pattern}")


def test_fetch_keeps_order_and_gives_reasons(tmp_path):
    fill(tmp_path, ["a", "b"])
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(1001))
    (tmp_path / "exact").write_bytes(bytes(1000))
    names = ["b", None, "gone", "large", "a", "empty", ".", "exact", "a/below-a-file"]
    results = fetch([name if name is None else str(tmp_path / name) for name in names], max_bytes=1000)
    shown = [result.reason if isinstance(result, BadItem) else result for result in results]
    assert shown == [b"b", None, "missing", "too_many_bytes", b"a", b"", "missing", bytes(1000), "missing"]
    assert pickle.loads(pickle.dumps(results[2])).detail == results[2].detail
    assert fetch([], max_bytes=1) == []


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    started = time.perf_counter()
    assert fetch([str(tmp_path / "sparse")], max_bytes=1000)[0].reason == "too_many_bytes"
    assert time.perf_counter() - started < 1


def test_a_source_is_named_by_what_it_is_not_how_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source_name("photos/") == source_name(f"file://{tmp_path}/photos") == str(tmp_path / "photos")
    assert source_name(["s3a://bucket/a/", "photos"]) == f"s3://bucket/a,{tmp_path}/photos"
    assert canonical("gcs://b/x") == "gs://b/x"


def test_many_local_files_are_listed_fast(tmp_path):
    """20,000 here, to be kind; 200,000 take ten times that (measured in benchmarks)."""
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for name in range(1000):
            os.close(os.open(tmp_path / str(folder) / f"{name}.jpg", os.O_CREAT))
    started = time.process_time()
    assert find(str(tmp_path), suffixes=[".jpg"]).num_rows == 20_000
    assert time.process_time() - started < 1.0


def test_s3_is_listed_with_etags_and_read_concurrently(s3):
    client, options = s3
    odd_names = [name for name in ODD_NAMES if "\n" not in name]  # the server's limit, not ours
    for name in [*odd_names, "deep/x.jpg", ".hidden.jpg", "_SUCCESS", "notes.txt"]:
        client.put_object(Bucket="bucket", Key=f"photos/{name}", Body=name.encode())
    client.put_object(Bucket="bucket", Key="photos2/no.jpg", Body=b"no")
    client.put_object(Bucket="bucket", Key="photos/empty-folder/", Body=b"")
    table = find("s3a://bucket/photos/", suffixes=[".jpg"], storage_options=options)
    expected = sorted(f"s3://bucket/photos/{name}" for name in [*odd_names, "deep/x.jpg"])
    assert table["unit"].to_pylist() == expected
    etag = client.head_object(Bucket="bucket", Key="photos/deep/x.jpg")["ETag"].strip('"')
    assert table["version"][expected.index("s3://bucket/photos/deep/x.jpg")].as_py() == etag
    assert fetch(expected, max_bytes=1000, storage_options=options) == [unit.removeprefix("s3://bucket/photos/").encode() for unit in expected]
    assert units("s3://bucket/photos/deep/x.jpg", storage_options=options) == ["s3://bucket/photos/deep/x.jpg"]
    assert units("s3://bucket/photo*/*.jpg", storage_options=options).count("s3://bucket/photos2/no.jpg") == 1


def test_an_object_added_since_the_last_listing_is_seen(s3):
    """fsspec keeps listings for the life of a process."""
    client, options = s3
    client.put_object(Bucket="bucket", Key="growing/a", Body=b"a")
    assert len(units("s3://bucket/growing", storage_options=options)) == 1
    client.put_object(Bucket="bucket", Key="growing/b", Body=b"b")
    assert len(units("s3://bucket/growing", storage_options=options)) == 2


def test_s3_objects_that_are_gone_large_or_empty_have_their_reason(s3):
    client, options = s3
    client.put_object(Bucket="bucket", Key="some/large", Body=bytes(1001))
    client.put_object(Bucket="bucket", Key="some/exact", Body=bytes(1000))
    client.put_object(Bucket="bucket", Key="some/empty", Body=b"")
    names = ["s3://bucket/some/large", "s3://bucket/some/gone", None, "s3://bucket/some/exact", "s3://bucket/some/empty", "s3://nobucket/x"]
    results = fetch(names, max_bytes=1000, storage_options=options)
    shown = [result.reason if isinstance(result, BadItem) else result for result in results]
    assert shown == ["too_many_bytes", "missing", None, bytes(1000), b"", "missing"]


def test_a_large_object_can_be_read_in_places(s3):
    client, options = s3
    body = os.urandom(200_000)
    client.put_object(Bucket="bucket", Key="big/file #1.bin", Body=body)
    with open_file("s3://bucket/big/file #1.bin", options) as file:
        file.seek(150_000)
        assert file.read(100) == body[150_000:150_100]
    with pytest.raises(FileNotFoundError):
        open_file("s3://bucket/big/none", options)


def test_what_is_missing_in_s3_names_the_nearest(s3):
    client, options = s3
    client.put_object(Bucket="bucket", Key="pictures/a.jpg", Body=b"a")
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'pictures'\?"):
        find("s3://bucket/pictuers", storage_options=options)
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'bucket'\?"):
        find("s3://bukcet/pictures", storage_options=options)
    with pytest.raises(ConfigError, match=r"no files ending in \.png; it holds 1 \.jpg"):
        find("s3://bucket/pictures", suffixes=[".png"], storage_options=options)


@contextlib.contextmanager
def answering(reply):
    """A server that gives every request the same answer, or none at all."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                held.append(connection)
                if reply is not None:
                    connection.recv(65536)
                    connection.sendall(reply)
                    connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server.getsockname()[1]}"}
    server.close()
    [connection.close() for connection in held]


FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def test_a_forbidden_store_is_an_answer_at_once():
    started = time.perf_counter()
    with answering(FORBIDDEN) as options, pytest.raises(ConfigError, match=r"forbidden .*check the credentials"):
        find("s3://bucket/photos", storage_options=options)
    with answering(FORBIDDEN) as options:
        assert fetch(["s3://bucket/photos/a.jpg"], max_bytes=10, storage_options=options)[0].reason == "missing"
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"])
def test_refused_credentials_are_no_files_fault(code):
    """They are the same PermissionError as one forbidden object, and every file became a reject that no later run tried again."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    reply = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with answering(reply) as options, pytest.raises(CredentialsRefused, match=rf"credentials \({code}: no\); renew"):
        fetch(["s3://bucket/photos/a.jpg"], max_bytes=10, storage_options=options)


@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_an_unreachable_store_is_an_answer_within_seconds(how):
    started = time.perf_counter()
    with answering(None) as options:
        if how == "refuses":
            options["endpoint_url"] = "http://127.0.0.1:9"
        with pytest.raises(ConfigError, match=r"cannot be reached .*endpoint_url"):
            find("s3://bucket/photos", storage_options=options)
    assert time.perf_counter() - started < 20


def test_a_web_host_that_does_not_answer_is_not_a_file_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"cannot be reached .*Cannot connect"):
        find("http://127.0.0.1:9/a.jpg")


def test_web_addresses_are_fetched_one_by_one_and_fail_alone():
    reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
    gone = b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with answering(reply) as good, answering(gone) as bad:
        urls = [good["endpoint_url"] + "/a b?c=1#d", bad["endpoint_url"] + "/x", "http://127.0.0.1:9/x", "nostore://x/y", "http://["]
        results = fetch(urls, max_bytes=5)
        assert results[0] == b"hello"
        assert [result.reason for result in results[1:]] == ["missing"] * 4
        assert fetch(urls[:1], max_bytes=4)[0].reason == "too_many_bytes"
