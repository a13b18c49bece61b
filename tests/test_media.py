import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pydantic
import pytest
from PIL import Image

from pipeline.media import BadItem, Limits, decode, from_pixels, thumbnail, to_pixels
from schemas.items import PIXELS

LIMITS = Limits()


def photo(height=40, width=60, seed=0):
    """A smooth picture with some noise: survives JPEG, and no two corners look alike."""
    rows, columns = np.mgrid[0:height, 0:width]
    base = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) * 255 / (height + width)], axis=-1)
    return np.clip(base + np.random.default_rng(seed).normal(0, 2, base.shape), 0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    target = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(target, kind, **options)
    return target.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, depth, colour, rows, *extra):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def reason_of(data, limits=LIMITS):
    with pytest.raises(BadItem) as caught:
        decode(data, limits)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_a_lossless_format_gives_the_pixels_back(kind):
    pixels = photo()
    decoded = decode(encoded(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})), LIMITS)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_a_jpeg_is_what_libjpeg_says(options):
    data = encoded(photo(), "JPEG", quality=90, **options)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_allclose(decode(data, LIMITS).astype(int), reference, atol=1)


def test_a_grey_jpeg_has_three_equal_channels():
    grey = photo()[..., 0]
    decoded = decode(encoded(grey, "JPEG", quality=95), LIMITS)
    assert decoded.shape == (40, 60, 3)
    assert (decoded == decoded[..., :1]).all()
    assert np.abs(decoded[..., 0].astype(int) - grey).mean() < 3


# EXIF 2.32: where stored row r, column c belongs in the upright picture of height H and width W.
PLACES = {
    1: lambda r, c, H, W: (r, c),
    2: lambda r, c, H, W: (r, W - 1 - c),
    3: lambda r, c, H, W: (H - 1 - r, W - 1 - c),
    4: lambda r, c, H, W: (H - 1 - r, c),
    5: lambda r, c, H, W: (c, r),
    6: lambda r, c, H, W: (c, W - 1 - r),
    7: lambda r, c, H, W: (H - 1 - c, W - 1 - r),
    8: lambda r, c, H, W: (H - 1 - c, r),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
    upright = photo(24, 32)
    height, width = upright.shape[:2]
    stored = np.empty((width, height, 3) if orientation > 4 else (height, width, 3), np.uint8)
    for row in range(stored.shape[0]):
        for column in range(stored.shape[1]):
            stored[row, column] = upright[PLACES[orientation](row, column, height, width)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    decoded = decode(encoded(stored, kind, exif=exif, **options), LIMITS)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)


def test_cmyk_jpeg_is_ink_on_white():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :8] = (255, 0, 0, 0)
    ink[:, 8:] = (0, 0, 0, 128)
    decoded = decode(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100), LIMITS).astype(int)
    assert np.abs(decoded[8, 3] - [0, 255, 255]).max() <= 3
    assert np.abs(decoded[8, 12] - [127, 127, 127]).max() <= 3


def test_ycck_jpeg_is_taken_apart_as_ycck():
    """Photoshop's CMYK files are stored as YCCK with inverted inks. A reader that takes them for CMYK shows other colours."""
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1] = 200
    data = bytearray(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(decode(bytes(data), LIMITS).astype(int)[8, 8] - [255, 55, 255]).max() <= 3
    data[data.index(b"Adobe") + 11] = 2  # the transform byte: the same numbers now say Y=255 Cb=55 Cr=255 K=255
    y, cb, cr = 255, 55 - 128, 255 - 128
    inverted_ink = np.clip([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 0, 255)
    assert np.abs(decode(bytes(data), LIMITS).astype(int)[8, 8] - (255 - inverted_ink)).max() <= 4


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.arange(65536, dtype=">u2").reshape(256, 256)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    decoded = decode(png(256, 256, 16, 0, rows), LIMITS)
    expected = np.round(values.astype(float) / 65535 * 255)
    assert np.abs(decoded[..., 0] - expected).max() == 0
    assert (decoded == decoded[..., :1]).all()
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values.astype(np.uint16)), "TIFF"), LIMITS), decoded)
    pgm = b"P5 256 256 65535\n" + values.tobytes()
    np.testing.assert_array_equal(decode(pgm, LIMITS), decoded)


def test_palette_with_transparency_shows_white():
    picture = Image.new("P", (4, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([0, 1, 0, 1])
    decoded = decode(encoded(picture, "PNG", transparency=0), LIMITS)
    assert decoded.tolist() == [[[255, 255, 255], [200, 100, 50], [255, 255, 255], [200, 100, 50]]]


def test_half_transparent_pixels_are_mixed_with_white():
    rgba = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128], [100, 0, 200, 51]]], np.uint8)
    expected = np.round(rgba[..., :3] * (rgba[..., 3:] / 255) + 255 * (1 - rgba[..., 3:] / 255))
    assert np.abs(decode(encoded(Image.fromarray(rgba, "RGBA"), "PNG"), LIMITS) - expected).max() <= 1
    grey_alpha = np.array([[[0, 0], [0, 255]]], np.uint8)
    assert decode(encoded(Image.fromarray(grey_alpha, "LA"), "PNG"), LIMITS).tolist() == [[[255] * 3, [0] * 3]]
    keyed = encoded(Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8)), "PNG", transparency=(9, 9, 9))
    assert decode(keyed, LIMITS).tolist() == [[[255] * 3, [1, 2, 3]]]


def test_a_large_image_is_converted_by_strips_without_a_seam():
    pixels = np.random.default_rng(3).integers(0, 256, (1500, 1100, 4), dtype=np.uint8)
    seen = decode(encoded(Image.fromarray(pixels), "PNG", compress_level=1), Limits())
    alpha = pixels[..., 3:] / 255
    np.testing.assert_allclose(seen, pixels[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    grey = np.random.default_rng(4).integers(0, 2**16, (1500, 1100), dtype=np.uint16)
    seen = decode(encoded(Image.fromarray(grey), "PNG", compress_level=1), Limits())
    np.testing.assert_allclose(seen, np.repeat(grey[..., None] / 257, 3, axis=2), atol=0.51)


def test_one_bit_images_are_black_and_white():
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert decode(encoded(bits, "PNG"), LIMITS).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), LIMITS)
    assert decoded.shape == (8, 8, 3)
    assert (decoded == [255, 0, 0]).all()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image_is_corrupt_never_half_grey(kind, share):
    data = encoded(photo(200, 300), kind)
    end = len(data) - 16 if kind == "PNG" else len(data)  # PNG's last 12 bytes hold nothing
    assert reason_of(data[: int(end * share)]) == "corrupt_image"


def test_a_jpeg_cut_in_half_and_closed_again_is_corrupt():
    """libjpeg only warns here, and PIL shows the lower half in grey."""
    data = encoded(photo(200, 300), "JPEG")
    assert reason_of(data[: len(data) // 2] + b"\xff\xd9") == "corrupt_image"


def test_harmless_bytes_after_the_picture_are_ignored():
    data = encoded(photo(), "JPEG")
    np.testing.assert_array_equal(decode(data + b"\0" * 100, LIMITS), decode(data, LIMITS))


def test_padding_between_segments_is_not_damage():
    data = encoded(photo(), "JPEG")
    at = data.index(b"\xff\xdb")
    np.testing.assert_allclose(decode(data[:at] + b"\0\0\0" + data[at:], LIMITS).astype(int), decode(data, LIMITS), atol=1)


def test_what_is_no_image_is_said_to_be_none():
    assert reason_of(b"") == "empty"
    assert reason_of(b"a text that was named cat.jpg") == "not_an_image"
    assert reason_of(b"<!DOCTYPE html><html>404</html>") == "not_an_image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not_an_image"
    assert reason_of(bytes(1000)) == "not_an_image"


def test_float_pixels_are_refused_because_white_is_unknown():
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    assert reason_of(encoded(floats, "TIFF")) == "not_an_image"


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    row = b"\0" + bytes(30_000 * 3)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(300)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(bomb) < 100_000
    assert reason_of(bomb) == "too_many_pixels"


def test_the_pixel_limit_is_the_jobs_own_not_pils():
    data = encoded(Image.new("1", (14_000, 14_000)), "PNG")  # PIL alone refuses from 178,956,970 pixels on
    assert reason_of(data) == "too_many_pixels"
    assert decode(data, Limits(max_pixels=200_000_000)).shape == (14_000, 14_000, 3)
    assert reason_of(encoded(photo(), "PNG"), Limits(max_pixels=40 * 60 - 1)) == "too_many_pixels"
    assert decode(encoded(photo(), "PNG"), Limits(max_pixels=40 * 60)).shape == (40, 60, 3)


def test_pils_warnings_do_not_leak():
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\xff\xff" + b"\x12\x01\x03\0"  # says 65535 entries, holds none
    data = encoded(photo(), "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert decode(data, LIMITS).shape == (40, 60, 3)
    assert not seen


def test_random_damage_gives_pixels_or_a_reason():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "ICO"):
        data = encoded(photo(), kind)
        for _ in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 5):
                broken[at] = rng.integers(256)
            try:
                assert decode(bytes(broken), Limits(max_pixels=10_000)).shape[2] == 3
            except BadItem as bad:
                assert bad.reason in ("not_an_image", "corrupt_image", "too_many_pixels")


def test_many_threads_decode_the_same():
    data = [encoded(photo(seed=seed), "PNG") for seed in range(8)]
    expected = [decode(entry, LIMITS) for entry in data]
    wrong = []

    def work():
        for entry, pixels in zip(data, expected, strict=True):
            if not np.array_equal(decode(entry, LIMITS), pixels):
                wrong.append(entry)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_pixels_survive_the_column_with_nulls_slices_and_chunks():
    images = [photo(3, 5), None, photo(7, 2, 1), np.zeros((0, 4, 3), np.uint8), None, photo(1, 1, 2)]
    column = to_pixels(images)
    column.validate(full=True)
    assert column.type == PIXELS and column.null_count == 2
    assert column[0].as_py()["rgb"] == images[0].tobytes()
    chunked = pa.chunked_array([column.slice(0, 2), column.slice(2), column.slice(0, 0)])
    for back, expected in [(from_pixels(column), images), (from_pixels(column.slice(2, 3)), images[2:5]), (from_pixels(chunked), images)]:
        assert len(back) == len(expected)
        for one, other in zip(back, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or np.array_equal(one, other)
    assert from_pixels(to_pixels([])) == [] and from_pixels(to_pixels([None])) == [None]


def test_from_pixels_copies_nothing():
    column = to_pixels([photo()])
    image = from_pixels(column)[0]
    assert not image.flags.writeable
    assert image.__array_interface__["data"][0] == column.field("rgb").buffers()[2].address


def test_to_pixels_refuses_what_is_no_rgb_image():
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        to_pixels([np.zeros((3, 3, 3), np.float32)])
    huge = np.broadcast_to(np.uint8(0), (30_000, 30_000, 3))
    with pytest.raises(ValueError, match="2 GiB"):
        to_pixels([huge])


def test_a_thumbnail_keeps_its_shape_and_is_never_enlarged():
    image = photo(192, 288)
    small = decode(thumbnail(image, 96), LIMITS)
    assert small.shape == (64, 96, 3)
    assert np.abs(small - image.reshape(64, 3, 96, 3, 3).mean((1, 3)))[1:-1, 1:-1].mean() < 4
    assert decode(thumbnail(photo(40, 60), 96), LIMITS).shape == (40, 60, 3)
    assert decode(thumbnail(np.zeros((1, 1000, 3), np.uint8), 96), LIMITS).shape == (1, 96, 3)


@pytest.mark.parametrize("wrong", [{"max_item_bytes": 0}, {"max_pixels": -1}, {"item_timeout_s": 0}, {"max_rejects": 1.5}, {"max_rejects": -0.1}])
def test_limits_are_bounded(wrong):
    with pytest.raises(pydantic.ValidationError):
        Limits(**wrong)
