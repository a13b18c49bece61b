"""The fast reader gives OpenSlide's pixels, bit by bit, and says of itself what OpenSlide says."""

from concurrent.futures import ThreadPoolExecutor

import fsspec
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile

from pipeline.slides import BadSlide
from pipeline.slides.cache import SlideCache
from pipeline.slides.opening import open_slide
from tests.slides.build import drawn_textures, render, some_scene, write_encoded, write_ome, write_svs, write_tiff

WRITERS = {"svs": write_svs, "tiff": write_tiff, "ome": write_ome}


@pytest.fixture(scope="session")
def canvas():
    """Two drawn blobs, 1900 x 1300 px: no side divides by 256 or 4 * 256."""
    textures = drawn_textures()
    return render(some_scene(list(textures), width_um=950, height_um=650), textures, mpp=0.5).image


@pytest.fixture(scope="session")
def built(canvas, tmp_path_factory):
    """The canvas in each format, by name."""
    folder = tmp_path_factory.mktemp("built")
    return {name: write(folder / f"slide-{name}.{name}", canvas) for name, write in WRITERS.items()}


def regions(info, *, seed, count):
    """Level and whole px of it, aligned with the stored tiles, shifted, small, and across every edge."""
    rng = np.random.default_rng(seed)
    for level, of in enumerate(info.levels):
        yield level, (0, 0), (256, 256)
        yield level, (info.tile_width, info.tile_height), (info.tile_width, info.tile_height)
        yield level, (of.width - 100, of.height - 100), (256, 256)
        yield level, (of.width + 5, 0), (20, 20)
        for _ in range(count):
            yield level, (int(rng.integers(-90, of.width)), int(rng.integers(-90, of.height))), (int(rng.integers(1, 600)), int(rng.integers(1, 600)))


def assert_same_pixels(path, *, count):
    fast, slow = open_slide(str(path)), open_slide(str(path), fast=False)
    assert fast.info.reader.startswith("tiled-jpeg")
    assert slow.info.reader.startswith("openslide")
    for level, (x, y), size in regions(slow.info, seed=1, count=count):
        downsample = slow.info.levels[level].downsample
        assert downsample == int(downsample)
        place = (x * int(downsample), y * int(downsample))
        ours, theirs = (slide.read(place, level=level, size=size) for slide in (fast, slow))
        assert ours.shape == (size[1], size[0], 4)
        assert np.array_equal(ours, theirs), (level, place, size)
        ours, theirs = (slide.read_rgb(place, level=level, size=size, white=(240, 250, 230)) for slide in (fast, slow))
        assert np.array_equal(ours, theirs), (level, place, size)
    fast.close()
    slow.close()


def test_a_real_aperio_slide_reads_as_openslide_reads_it(slide_assets):
    """Its tiles are RGB JPEG without a marker that says so, and share their tables."""
    assert_same_pixels(slide_assets / "cmu_small_region.svs", count=40)


@pytest.mark.parametrize("name", WRITERS)
def test_a_built_slide_reads_as_openslide_reads_it(built, canvas, name):
    size = (1024, 1024)  # divides by 16: all downsamples are whole
    path = built[name].with_name(f"whole-{name}.{name}")
    WRITERS[name](path, canvas[: size[1], : size[0]])
    assert_same_pixels(path, count=12)


def test_outside_the_slide_is_transparent(built):
    for fast in (True, False):
        slide = open_slide(str(built["svs"]), fast=fast)
        pixels = slide.read((1900 - 100, 1300 - 60), level=0, size=(200, 100))
        assert (pixels[:60, :100, 3] == 255).all()
        assert not pixels[60:].any()
        assert not pixels[:, 100:].any()
        assert not slide.read((-50, -50), level=0, size=(40, 40)).any()
        assert slide.read((-50, -30), level=0, size=(51, 31))[30, 50, 3] == 255


def test_a_region_begins_at_the_nearest_whole_px_of_its_level(built):
    """Between whole px OpenSlide interpolates, which blurs a tile by how it happens to lie."""
    stored = tifffile.imread(built["svs"], key=2)
    slide = open_slide(str(built["svs"]))
    downsample = slide.info.levels[1].downsample
    for x in (400, 401, 402, 403, 1003):
        column = round(x / downsample)
        assert np.array_equal(slide.read((x, 0), level=1, size=(40, 40))[..., :3], stored[:40, column : column + 40])


def test_downsamples_are_not_truncated(tmp_path, canvas):
    """A pyramid whose sides were rounded up: 3.99 truncated to 3 would read a third too much."""
    path = write_tiff(tmp_path / "ceil.tiff", canvas[:1021, :1021], ceil_levels=True, downsamples=(4,))
    for fast in (True, False):
        (_, level) = open_slide(str(path), fast=fast).info.levels
        assert (level.width, level.height) == (256, 256)
        assert level.downsample == pytest.approx(1021 / 256)
    assert openslide.OpenSlide(path).level_downsamples[1] == level.downsample


def test_what_a_slide_says_of_itself(built, slide_assets):
    info = open_slide(str(slide_assets / "cmu_small_region.svs")).info
    assert (info.vendor, info.width, info.height, info.objective, info.compression) == ("aperio", 2220, 2967, 20, "JPEG")
    assert (info.mpp_x, info.mpp_y, info.mpp_source, info.mpp_flags, info.tile_width) == (0.499, 0.499, "openslide", (), 240)
    assert info.mpp == pytest.approx(0.499)
    sizes = [(1900, 1300), (475, 325), (118, 81)]
    for name, vendor, source in [("svs", "aperio", "openslide"), ("tiff", "generic-tiff", "tiff"), ("ome", "ome", "ome.PhysicalSize")]:
        info = open_slide(str(built[name])).info
        assert (info.vendor, info.mpp_source, info.notes) == (vendor, source, ())
        assert info.mpp == pytest.approx(0.5)
        assert [(level.width, level.height) for level in info.levels] == sizes


def test_an_ome_pyramid_has_levels_that_openslide_does_not_see(built, canvas):
    slide = open_slide(str(built["ome"]))
    assert len(openslide.OpenSlide(built["ome"]).level_dimensions) == 1
    with tifffile.TiffFile(built["ome"]) as tiff:
        stored = tiff.series[0].levels[1].asarray()
    assert np.array_equal(slide.read((0, 0), level=1, size=(475, 325))[..., :3], stored)


def test_threads_share_a_slide(built):
    slide, alone = open_slide(str(built["svs"])), open_slide(str(built["svs"]))
    places = [(x, y) for y in range(-100, 1300, 190) for x in range(-100, 1900, 190)]

    def read(place):
        return slide.read(place, level=0, size=(256, 256))

    with ThreadPoolExecutor(8) as pool:
        for place, pixels in zip(places, pool.map(read, places), strict=True):
            assert np.array_equal(pixels, alone.read(place, level=0, size=(256, 256)))


def test_other_compressions_and_single_levels_are_read_by_openslide_or_as_they_are(tmp_path, canvas):
    deflated = open_slide(str(write_tiff(tmp_path / "deflate.tiff", canvas, compression="deflate")))
    assert deflated.info.reader.startswith("openslide")
    assert "not JPEG" in " ".join(deflated.info.notes)
    assert np.array_equal(deflated.read((100, 100), level=0, size=(300, 300))[..., :3], canvas[100:400, 100:400])
    assert open_slide(str(write_svs(tmp_path / "one.svs", canvas, downsamples=()))).info.levels[0].downsample == 1


def test_a_layout_that_decodes_to_other_pixels_is_left_to_openslide(tmp_path, canvas):
    """Colours that a tag misnames: OpenSlide's pixels are the reference, so the fast reader follows them or steps back."""
    path = write_svs(tmp_path / "misnamed.svs", canvas)
    with tifffile.TiffFile(path) as tiff:
        value = tiff.pages[0].tags["PhotometricInterpretation"].valueoffset
    with path.open("r+b") as file:
        file.seek(value)
        file.write((2).to_bytes(2, "little"))  # RGB, for a stream of YCbCr
    fast, slow = open_slide(str(path)), open_slide(str(path), fast=False)
    assert np.array_equal(fast.read((300, 300), level=0, size=(256, 256)), slow.read((300, 300), level=0, size=(256, 256)))


JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
MARKERS = {"none": b"", "jfif": JFIF, "rgb": ADOBE + b"\0", "ycc": ADOBE + b"\1", "jfif-rgb": JFIF + ADOBE + b"\0", "jfif-ycc": JFIF + ADOBE + b"\1"}


@pytest.mark.parametrize("markers", MARKERS)
@pytest.mark.parametrize(("photometric", "space"), [(2, "RGB"), (6, "YCBCR")])
def test_the_tag_decides_on_colours_whatever_the_stored_streams_say(tmp_path, canvas, photometric, space, markers):
    """JFIF says YCbCr to a decoder whatever else is said; RGB tiles with it came out 49 levels off where OpenSlide could not be asked, in a store."""

    def encode(tile):
        stream = imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=95, colorspace="RGB", outcolorspace=space, subsampling="444")
        bare = stream.replace(JFIF[:9], b"\xff\xe1\x00\x10None\0").replace(ADOBE[:9], b"\xff\xe1\x00\x0eNone\0")
        return bare[:2] + MARKERS[markers] + bare[2:]

    image = canvas[256:768, 256:768]
    path = write_encoded(tmp_path / "slide.tiff", image, encode, photometric=photometric)
    assert_same_pixels(path, count=3)
    fsspec.filesystem("memory").pipe_file("/slide.tiff", path.read_bytes())
    pixels = open_slide("memory://slide.tiff").read((0, 0), level=0, size=(512, 512))[..., :3]
    assert np.abs(pixels.astype(int) - image).mean() < 3


def test_a_slide_whose_tiles_only_openslide_reads_is_left_to_it(tmp_path, canvas):
    """All of its tiles were rejected: what the fast reader could not read was taken to be damaged."""

    def encode(tile):
        return imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=90)[:-2] + bytes(16) + b"\xff\xd9"

    path = write_encoded(tmp_path / "slide.tiff", canvas[:512, :512], encode, photometric=6)
    slide = open_slide(str(path))
    assert slide.info.reader.startswith("openslide")
    assert "extraneous bytes before marker 0xd9, and OpenSlide reads it" in slide.info.notes[-1]
    assert np.abs(slide.read((0, 0), level=0, size=(512, 512))[..., :3].astype(int) - canvas[:512, :512]).mean() < 5
    fsspec.filesystem("memory").pipe_file("/slide.tiff", path.read_bytes())
    with pytest.raises(BadSlide, match=r"cannot be read by ranges .*extraneous bytes"):
        open_slide("memory://slide.tiff")
    cached = open_slide("memory://slide.tiff", cache=SlideCache(tmp_path / "cache", max_bytes=10**8))
    assert cached.info.reader == slide.info.reader
