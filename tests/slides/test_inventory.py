"""Which slides are listed, what they are called, and what is joined to them."""

import errno
import glob
import os
import pickle

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.config import ConfigError
from pipeline.slides.inventory import Slides, take_inventory, version_now


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listed(**settings):
    return {slide.slide_id: slide for slide in take_inventory(Slides.model_validate(settings)).slides}


def test_a_slide_is_called_by_its_path_and_not_by_its_stem(tmp_path):
    for name in ("a/x.svs", "b/x.svs", "b/x.tiff", "b/notes.txt"):
        touch(tmp_path / name)
    assert set(listed(uri=str(tmp_path))) == {"a/x.svs", "b/x.svs", "b/x.tiff"}
    assert set(listed(uri=[str(tmp_path / "a"), str(tmp_path / "b" / "*.tiff")])) == {"x.svs", "x.tiff"}
    touch(tmp_path / "autumn [2024] *" / "c" / "x.svs")
    assert set(listed(uri=str(tmp_path / "autumn [2024] *"))) == {"c/x.svs"}, "also if the folder's own name looks like a glob"


def test_two_slides_of_one_name_in_two_places_are_refused_with_what_to_do(tmp_path):
    touch(tmp_path / "a" / "x.svs")
    touch(tmp_path / "b" / "x.svs")
    with pytest.raises(ConfigError, match="name the folder above both"):
        listed(uri=[str(tmp_path / "a"), str(tmp_path / "b")])


def test_files_that_belong_together_are_one_slide_and_change_it(tmp_path):
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat", "series/1.dcm", "series/2.dcm", "stray.dat"):
        touch(tmp_path / name)
    before = listed(uri=str(tmp_path))
    assert set(before) == {"m.mrxs", "series"}
    assert before["series"].num_bytes == 2
    touch(tmp_path / "m" / "Data0000.dat", b"other")
    touch(tmp_path / "series" / "2.dcm", b"other")
    after = listed(uri=str(tmp_path))
    for slide_id, slide in after.items():
        assert slide.version != before[slide_id].version
        assert version_now(slide.uri, None) == slide.version
    os.remove(tmp_path / "m.mrxs")
    assert version_now(str(tmp_path / "m.mrxs"), None) is None


@pytest.mark.parametrize("place", ["m.mrxs", "*.mrxs", "M*", "series/1.dcm", "series/*.dcm", "", "[ab]/x.mrxs"])
def test_a_slide_of_several_files_has_one_version_however_it_is_named(tmp_path, place):
    """Named by a file or a glob, its version was of that file alone; looked at again while its tiles were read, of all: it counted as replaced
    on every run. A bracket in its path was taken for a glob's."""
    root = tmp_path / "[case]"
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat", "m/below/Data0000.dat", "M2.MRXS", "M2/Slidedat.ini", "series/1.dcm", "series/2.dcm"):
        touch(root / name)
    touch(root / "[ab]" / "x.mrxs")
    touch(root / "[ab]" / "x" / "Data0000.dat")
    uri = str(root / place) if place in ("", "m.mrxs", "series/1.dcm") else f"{glob.escape(str(root))}/{place}"
    if place == "[ab]/x.mrxs":
        uri = str(root / place)
    found = listed(uri=uri)
    assert found
    everything = {slide.uri: slide for slide in listed(uri=str(root)).values()}
    for slide in found.values():
        assert version_now(slide.uri, None) == slide.version == everything[slide.uri].version
        assert slide.num_bytes == everything[slide.uri].num_bytes >= 2


def test_a_slide_that_cannot_be_looked_at_is_not_gone(tmp_path, monkeypatch):
    """A disk or a store that did not answer for a moment counted as a slide that was replaced, and the work on it was thrown away."""
    slide = str(touch(tmp_path / "a.svs"))

    def stale(path, *rest, **more):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stale)
        with pytest.raises(OSError, match="Stale"):
            version_now(slide, None)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/case/a.svs", b"x")
    assert version_now("memory:///case/a.svs", None)
    assert version_now("memory:///case/b.svs", None) is None
    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "info", stale)
        with pytest.raises(OSError, match="Stale"):
            version_now("memory:///case/a.svs", None)


def test_nothing_but_other_files_is_refused(tmp_path):
    touch(tmp_path / "readme.txt")
    with pytest.raises(ConfigError, match=r"no files ending in \.svs"):
        listed(uri=str(tmp_path))
    touch(tmp_path / "stray.dat")
    with pytest.raises(ConfigError, match=r"slides\.suffixes"):
        listed(uri=str(tmp_path))


def test_metadata_keeps_text_as_text_and_types_as_declared(tmp_path):
    for name in ("a/x.svs", "b/y.svs", "b/z.svs"):
        touch(tmp_path / name)
    table = tmp_path / "cases.csv"
    table.write_text("slide,patient,age\na/x.svs,007,61\ny.svs,008,\n")
    settings = {"uri": str(tmp_path), "metadata": {"uri": str(table), "columns": {"patient": "string", "age": "int32"}}}
    found = listed(**settings)
    assert dict(found["a/x.svs"].carried) == {"patient": "007", "age": 61}
    assert dict(found["b/y.svs"].carried) == {"patient": "008", "age": None}, "a file's name alone is enough where it is the only one"
    assert dict(found["b/z.svs"].carried) == {"patient": None, "age": None}
    pyarrow.parquet.write_table(pa.table({"slide": ["b/z.svs"], "patient": [9], "age": [1]}), tmp_path / "cases.parquet")
    settings["metadata"] = {"uri": str(tmp_path / "cases.parquet"), "columns": ["patient"]}
    assert dict(listed(**settings)["b/z.svs"].carried) == {"patient": 9}
    inventory = take_inventory(Slides.model_validate(settings))
    assert pickle.loads(pickle.dumps(inventory)) == inventory


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("slide,patient\na.svs,1\n", {"columns": ["patent"]}, "did you mean 'patient'"),
        ("path,patient\na.svs,1\n", {"columns": ["patient"]}, "no column 'slide'"),
        ("slide,age\na.svs,old\n", {"columns": {"age": "int32"}}, "row 1: age is not int32: 'old'"),
        ("slide,um\na.svs,352\n", {"mpp": "um"}, "must be microns per px"),
        ("slide,um\na.svs,0.5\na.svs,0.25\n", {"mpp": "um"}, "two rows for the slide 'a.svs'"),
        ("slide,x\na.svs,1\n", {"columns": ["x"]}, "which a tile's row has itself"),
        ("slide,id\na.svs,1\n", {"columns": ["id"]}, "name that the vector table uses itself"),
    ],
)
def test_what_is_wrong_with_metadata_is_said_before_anything_is_opened(tmp_path, text, settings, said):
    touch(tmp_path / "a.svs")
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(ConfigError, match=said):
        listed(uri=str(tmp_path), metadata={"uri": str(tmp_path / "cases.csv"), **settings})


def test_metadata_that_is_not_there_is_named(tmp_path):
    touch(tmp_path / "a.svs")
    with pytest.raises(ConfigError, match=r"cannot be read: FileNotFoundError.*cases\.csv"):
        listed(uri=str(tmp_path), metadata={"uri": str(tmp_path / "cases.csv")})
