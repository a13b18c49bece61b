"""Encoders whose files are in a store: the same fingerprint and vectors as from a folder, one copy a machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError, Ref
from pipeline.encoders.folder import FolderSpec, save_folder
from pipeline.encoders.local_copy import local_copy
from pipeline.encoders.saved import open_encoder
from pipeline.encoders.sentence import Sentence
from pipeline.table.at import TableAt, model_of
from pipeline.table.ledger import record_model
from pipeline.vlm.card import Card
from tests.encoders.models import items_of, save_bert, save_sentence_transformer

BUCKET = "weights"
TEXTS = items_of(["a cat", "two dogs", "Zürich"])


@pytest.fixture
def store(s3_environment, tmp_path, monkeypatch):
    """Puts a folder into a bucket; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3_environment.create_bucket(Bucket=BUCKET)
    yield lambda folder, key: put(s3_environment, folder, key)
    for entry in s3_environment.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        s3_environment.delete_object(Bucket=BUCKET, Key=entry["Key"])


def put(client, folder, key):
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"{key}/{path.relative_to(folder)}")
    return f"s3://{BUCKET}/{key}"


@pytest.fixture
def model(tmp_path):
    save_bert(tmp_path / "bert")
    save_sentence_transformer(tmp_path / "model", tmp_path / "bert", ["mean"])
    return tmp_path / "model"


def copies(tmp_path):
    return [path for path in (tmp_path / "cache" / "tessera").iterdir() if path.is_dir()]


def test_a_model_in_a_store_is_the_model_of_the_folder(store, model, tmp_path):
    """Only paths were taken: a URI was told that there is no such folder."""
    local, stored = Sentence(str(model)), Sentence(store(model, "m"))
    assert stored.fingerprint == local.fingerprint
    assert np.array_equal(stored.encode(TEXTS), local.encode(TEXTS))
    assert Sentence(f"s3://{BUCKET}/m/").fingerprint == local.fingerprint
    assert len(copies(tmp_path)) == 1


def test_an_encoder_that_was_saved_to_a_store_opens_there(store, model, tmp_path):
    def write(part):
        shutil.copytree(model, part, dirs_exist_ok=True)

    save_folder(tmp_path / "saved", write, spec=FolderSpec(encoder="sentence"), card=Card(name="mine", base="bert"))
    local, stored = open_encoder(str(tmp_path / "saved")), open_encoder(store(tmp_path / "saved", "saved"))
    assert stored.fingerprint == local.fingerprint
    assert np.array_equal(stored.encode(TEXTS), local.encode(TEXTS))


def test_what_was_replaced_in_the_store_is_copied_anew(store, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x").write_text("old")
    uri = store(tmp_path / "f", "f")
    first = local_copy(uri)
    (tmp_path / "f" / "x").write_text("new")
    store(tmp_path / "f", "f")
    assert (local_copy(uri) / "x").read_text() == "new"
    assert (first / "x").read_text() == "old"
    assert local_copy(f"{uri}/x").read_text() == "new"


def test_processes_at_once_copy_a_folder_once(store, model, tmp_path):
    uri = store(model, "m")
    code = f"import os; from pipeline.encoders.local_copy import local_copy; p = local_copy({uri!r}); print(p, os.stat(p).st_ino, len(os.listdir(p)))"
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {worker.communicate(timeout=60)[0] for worker in workers}
    assert len(said) == 1 and f" {len(list(model.iterdir()))}\n" in said.pop()
    assert len(copies(tmp_path)) == 1


def test_a_copy_that_fails_leaves_nothing(store, model, tmp_path, monkeypatch):
    uri = store(model, "m")

    def half(self, sources, targets):
        Path(targets[0]).write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("s3fs.S3FileSystem.get", half)
    with pytest.raises(ConfigError, match="no space left"):
        local_copy(uri)
    assert not copies(tmp_path)


def test_a_uri_without_files_says_so(store, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Sentence(f"s3://{BUCKET}/nothing")
    assert local_copy(f"file://{tmp_path}") == tmp_path == local_copy(str(tmp_path))


def test_options_of_an_encoder_reach_the_store_and_are_not_kept(s3_server, model, tmp_path, monkeypatch):
    client, options = s3_server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client.create_bucket(Bucket=BUCKET)
    uri = put(client, model, "own")
    save_folder(
        tmp_path / "saved",
        lambda part: shutil.copytree(model, part, dirs_exist_ok=True),
        spec=FolderSpec(encoder="sentence"),
        card=Card(name="m", base="b"),
    )
    saved = put(client, tmp_path / "saved", "own-saved")
    stored, opened = Sentence(uri, storage_options=options), open_encoder(saved, storage_options=options)
    assert stored.fingerprint == Sentence(str(model)).fingerprint == opened.fingerprint
    ref, at = Ref(target="pipeline.encoders.sentence:Sentence", args={"model": uri, "storage_options": options}), TableAt(uri=str(tmp_path), name="t")
    record_model(at, stored, ref, run="r")
    assert json.loads(model_of(at, stored.fingerprint)["args"]) == {"model": uri}
