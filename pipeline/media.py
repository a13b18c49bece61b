"""Bytes to pixels and back: decode one image of any common format to RGB, columns of pixels, thumbnails.

Pixels are taken as they are stored: an ICC profile is not applied, as open_clip and the models' training pipelines do
not. Of an animation the first frame counts. Transparency is shown on white.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pydantic
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.config import Model
from schemas.items import PIXELS
from schemas.rejects import REASONS

# Named, because PIL would run Ghostscript for EPS, and try forty more formats that no collection of photographs holds.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "ICO", "MPO")
JPEG, START_OF_SCAN, APP1 = b"\xff\xd8\xff", b"\xda", b"\xe1"
SIGNATURES = (JPEG, b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")
ORIENTATION_TAG = 0x0112
STRIP_PIXELS = 2**20
"""Pixels that are converted to RGB at once."""


class BadItem(Exception):
    """One item that cannot be embedded: `reason` is a key of REASONS, `detail` says what exactly was wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Limits(Model):
    """What one item may cost. An item beyond a limit is rejected; too many rejects fail the job."""

    max_item_bytes: int = pydantic.Field(default=64 * 2**20, gt=0)
    """Largest encoded item that is read, in bytes."""
    max_pixels: int = pydantic.Field(default=100_000_000, gt=0, le=700_000_000)
    """Largest image that is decoded, width times height, at most 700 million: a column holds 2 GiB. Known from the header, so a
    decompression bomb costs nothing. What it means in memory: `pipeline.compute`."""
    item_timeout_s: float = pydantic.Field(default=60.0, gt=0)
    """Longest time one item may take in a worker, in seconds. What is done for many together (fetching, reading a container, a
    call of the encoder, staging) may take sixteen times that; then the worker is ended and started anew. An item that is
    overdue twice while the worker has nothing else in hand is rejected."""
    max_rejects: float = pydantic.Field(default=0.01, ge=0, le=1)
    """Share of the items, 0 to 1, that may be rejected before the job fails. What is good stays committed."""


def decode(data: bytes, limits: Limits) -> np.ndarray:
    """The image in `data` as RGB: uint8 (H, W, 3), upright as its EXIF orientation says.

    16-bit grey is scaled to 8 bits. Raises BadItem: `empty`, `not_an_image` (also float and 32-bit integer pixels, which
    do not say how bright white is), `too_many_pixels`, `corrupt_image` (also truncated: never a half-grey picture).
    """
    if not data:
        raise BadItem("empty", "zero bytes")
    pixels = _decode_plain_jpeg(data, limits)
    if pixels is None:
        pixels = _decode_any(data, limits)
    return np.ascontiguousarray(pixels)


def _decode_plain_jpeg(data: bytes, limits: Limits) -> np.ndarray | None:
    """Pixels of a JPEG in which nothing can ask to be turned, without PIL, whose look at the header takes a twentieth of the decoding.

    None if the data are something else, or damaged.
    """
    if not data.startswith(JPEG) or _may_turn(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    _check_size(width, height, limits)
    return _decode_jpeg(data)


def _may_turn(jpeg: bytes) -> bool:
    """Whether a JPEG has a segment that EXIF or XMP would be in (APP1), or one cannot say (ISO/IEC 10918-1, annex B.1.1)."""
    place = 2
    while jpeg[place : place + 1] == b"\xff":
        marker = jpeg[place + 1 : place + 2]
        if marker == START_OF_SCAN:
            return False
        if marker == APP1:
            return True
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4])
    return True


def _decode_any(data: bytes, limits: Limits) -> np.ndarray:
    """Pixels of an image of any format, upright."""
    _own_limits()
    image = _open(data)
    _check_size(*image.size, limits)
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        pixels = _decode_jpeg(data)
    if pixels is None:
        pixels = _safely(lambda: _to_rgb(image))
    # After the pixels: PIL turns some formats itself while it loads them, and then drops the tag.
    return _upright(pixels, _orientation(image))


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise BadItem("too_many_pixels", f"{width} x {height} pixels; limits.max_pixels is {limits.max_pixels}")


def _own_limits() -> None:
    """Keep PIL's warnings out of the job's log, and its own bomb limit out of the way of `max_pixels`: both are process-wide."""
    Image.MAX_IMAGE_PIXELS = None
    if not any(entry[0] == "ignore" and getattr(entry[3], "pattern", None) == r"PIL\." for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:
        known = data.startswith(SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        if known:
            raise BadItem("corrupt_image", f"damaged header: {_said(error, data)}") from error
        raise BadItem("not_an_image", f"{len(data)} bytes that begin with {data[:12]!r}") from error


def _said(error: Exception, data: bytes) -> str:
    return f"{len(data)} bytes" if isinstance(error, UnidentifiedImageError) else str(error)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Pixels of a YCbCr, RGB or grey JPEG; None where PIL should try, because the fault may be harmless."""
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        # Cameras pad segments, and libjpeg calls the padding extraneous: nothing is missing then.
        if "extraneous" in str(error) or "subsampling" in str(error):
            return None
        raise BadItem("corrupt_image", str(error)) from error
    return pixels


def _safely(work: Callable[[], np.ndarray]) -> np.ndarray:
    """The result of a PIL operation on untrusted bytes, which may raise nearly anything."""
    try:
        return work()
    except (BadItem, MemoryError):
        raise
    except Exception as error:
        raise BadItem("corrupt_image", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image that PIL has opened, RGB. By strips, because PIL's own copies would be up to 22 bytes a pixel."""
    image.load()
    if image.mode in ("I", "F", "LAB") and not _is_16_bit(image):
        raise BadItem("not_an_image", f"pixels of mode {image.mode} in a {image.format} have no defined white; convert them to 8 or 16 bits")
    convert = _grey_to_rgb if _is_16_bit(image) else _colours_to_rgb
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return convert(image)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = convert(image.crop((0, top, width, bottom)))
    return pixels


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _grey_to_rgb(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _colours_to_rgb(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:
        # A picture with damaged EXIF is still a picture.
        return 1


# EXIF 2.32, 4.6.4 A: what row 0 and column 0 of the stored pixels show.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    turn = UPRIGHT.get(orientation)
    return turn(pixels) if turn else pixels


def to_pixels(images: Sequence[np.ndarray | None]) -> pa.StructArray:
    """Decoded images as one PIXELS column; null where there is none.

    Raises ValueError if they are not uint8 (H, W, 3), or take more than 2 GiB together: a column cannot hold more.
    """
    for image in images:
        if image is not None and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            raise ValueError(f"an image is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")
    shapes = np.array([(0, 0) if image is None else image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    offsets = np.concatenate([[0], np.cumsum(shapes.prod(axis=1) * 3)])
    if offsets[-1] > 2**31 - 1:
        raise ValueError(f"{len(images)} images are {offsets[-1]:,} bytes, more than the 2 GiB of one column; give fewer at a time")
    rgb = np.empty(offsets[-1], np.uint8)
    for image, start, stop in zip(images, offsets[:-1], offsets[1:], strict=True):
        if image is not None:
            rgb[start:stop].reshape(image.shape)[:] = image
    column = pa.Array.from_buffers(pa.binary(), len(images), [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(rgb)])
    height, width = (pa.array(shapes[:, axis].astype(np.int32)) for axis in (0, 1))
    missing = pa.array([image is None for image in images], pa.bool_())
    return pa.StructArray.from_arrays([height, width, column], fields=list(PIXELS), mask=missing)


def from_pixels(column: pa.StructArray | pa.ChunkedArray) -> list[np.ndarray | None]:
    """The images of a PIXELS column: uint8 (H, W, 3), read-only views of the column's memory; None where null."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return [image for chunk in chunks for image in _views(chunk)]


def _views(chunk: Any) -> list[np.ndarray | None]:
    if len(chunk) == 0:
        return []
    rgb = chunk.field("rgb")
    _, offset_buffer, data_buffer = rgb.buffers()
    kind = np.int64 if pa.types.is_large_binary(rgb.type) else np.int32
    offsets = np.frombuffer(offset_buffer, kind)[rgb.offset : rgb.offset + len(rgb) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None and data_buffer.size else np.empty(0, np.uint8)
    # A caller that could write here would change the column under everyone who shares it.
    data = data.view()
    data.flags.writeable = False
    heights = chunk.field("height").fill_null(0).to_numpy()
    widths = chunk.field("width").fill_null(0).to_numpy()
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    spans = zip(offsets[:-1], offsets[1:], heights, widths, valid, strict=True)
    return [data[start:stop].reshape(height, width, 3) if ok else None for start, stop, height, width, ok in spans]


def thumbnail(image: np.ndarray, px: int) -> bytes:
    """A JPEG of `image` whose longer side is at most `px`; never enlarged."""
    small = Image.fromarray(image)
    small.thumbnail((px, px))
    target = io.BytesIO()
    small.save(target, "JPEG", quality=85)
    return target.getvalue()
