"""Test slides with known truth: tissue of real or drawn textures on glass, written as the formats that scanners write.

A scene is laid out in microns and rendered at any mpp, so that the same tissue can come from several scanners. What is written can
then be damaged by hand: `zero_tile`, `half_zero_tile`, `cut`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import tifffile

BASE_MPP = 0.5
"""Textures have it, and scenes are drawn at it before they are brought to a scanner's mpp."""
GLASS = (243, 243, 244)
PEN = (40, 60, 170)
PEN_LABEL = 255
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Optical density (red, green, blue) of haematoxylin and eosin."""
FIELDS = {  # x, y, width, height in the CMU slide
    "dermis": (870, 1340, 200, 520),
    "epidermis": (1120, 1560, 180, 340),
    "keratin": (1370, 960, 220, 220),
    "collagen": (1400, 1960, 290, 480),
}


@dataclass(frozen=True)
class Piece:
    """A blob of tissue: `texture` by name, centre and mean radius in microns."""

    texture: str
    x_um: float
    y_um: float
    radius_um: float


@dataclass(frozen=True)
class Scene:
    """What lies on the glass. The label of a piece's texture is its place, from 1, in the textures' sorted names."""

    width_um: float
    height_um: float
    pieces: tuple[Piece, ...]
    pen: tuple[tuple[float, float], ...] = ()
    """A polyline in microns, of `pen_um` thickness."""
    pen_um: float = 150.0
    seed: int = 0


@dataclass(frozen=True)
class Canvas:
    """A rendered scene: RGB (H, W, 3) at `mpp`, and which texture is where (0 glass, 255 pen) at `label_um` per px."""

    image: np.ndarray
    mpp: float
    labels: np.ndarray
    label_um: float = 8.0
    names: tuple[str, ...] = field(default=())


def drawn_textures(seed: int = 0) -> dict[str, np.ndarray]:
    """Two textures that need no package: nuclei on fibres, dense and sparse; 400 px each."""
    return {name: _drawn(np.random.default_rng([seed, i]), nuclei) for i, (name, nuclei) in enumerate([("dense", 700), ("sparse", 120)])}


def _drawn(rng: np.random.Generator, nuclei: int) -> np.ndarray:
    side = 400
    fibres = cv2.GaussianBlur(rng.normal(size=(side, side)).astype(np.float32), (0, 0), sigmaX=9, sigmaY=1.5)
    eosin = 0.7 + 3.0 * fibres
    haematoxylin = np.zeros((side, side), np.float32)
    for x, y in rng.integers(0, side, (nuclei, 2)):
        axes = tuple(int(a) for a in rng.integers(3, 8, 2))
        cv2.ellipse(haematoxylin, (int(x), int(y)), axes, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.8, 1.4)), -1)
    concentrations = np.stack([cv2.GaussianBlur(haematoxylin, (0, 0), 0.8), np.clip(eosin, 0.25, 2)], axis=-1)
    return np.clip(np.rint(243 * np.exp(-concentrations @ STAINS)), 0, 255).astype(np.uint8)


def real_textures(assets: Path) -> dict[str, np.ndarray]:
    """Four fields of the CMU slide and one of DAB, out of `demo.slide_assets.fetch_slides`."""
    slide = tifffile.imread(assets / "cmu_small_region.svs", key=0)
    textures = {name: slide[y : y + h, x : x + w] for name, (x, y, w, h) in FIELDS.items()}
    return textures | {"ihc": cv2.cvtColor(cv2.imread(str(assets / "ihc.png")), cv2.COLOR_BGR2RGB)}


def some_scene(names: list[str], *, width_um: float = 1024, height_um: float = 768, seed: int = 0, pen: bool = False) -> Scene:
    """One blob of each texture in a row across the glass, and a pen line down its right side if asked."""
    rng = np.random.default_rng(seed)
    step = width_um * (0.8 if pen else 1) / len(names)
    radius = 0.42 * min(step, height_um)
    pieces = tuple(
        Piece(name, step * (i + 0.5), height_um / 2 + float(rng.uniform(-0.05, 0.05)) * height_um, radius) for i, name in enumerate(sorted(names))
    )
    line = tuple((width_um * (0.9 + 0.02 * (-1) ** i), height_um * y) for i, y in enumerate((0.1, 0.35, 0.6, 0.9)))
    return Scene(width_um, height_um, pieces, pen=line if pen else (), pen_um=width_um * 0.06, seed=seed)


def render(scene: Scene, textures: dict[str, np.ndarray], *, mpp: float, stain: int | None = None) -> Canvas:
    """The scene as a scanner of `mpp` sees it; `stain`: the seed of a laboratory whose dyes differ from the textures' own."""
    names = tuple(sorted(textures))
    base, labels = _draw(scene, textures, names)
    if stain is not None:
        base = restain(base, stain)
    size = (round(scene.width_um / mpp), round(scene.height_um / mpp))
    image = cv2.resize(base, size, interpolation=cv2.INTER_AREA if mpp > BASE_MPP else cv2.INTER_CUBIC)
    # Background without noise would make stored tiles of a few bytes, as no scanner does.
    noise = np.random.default_rng(scene.seed + 1).normal(0, 1.2, (256, 256, 3))
    tiled = np.tile(noise, (size[1] // 256 + 1, size[0] // 256 + 1, 1))[: size[1], : size[0]]
    small = (round(scene.width_um / 8), round(scene.height_um / 8))
    return Canvas(
        image=np.clip(np.rint(image + tiled), 0, 255).astype(np.uint8),
        mpp=mpp,
        labels=cv2.resize(labels, small, interpolation=cv2.INTER_NEAREST_EXACT),
        names=names,
    )


def _draw(scene: Scene, textures: dict[str, np.ndarray], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(scene.seed)
    width, height = round(scene.width_um / BASE_MPP), round(scene.height_um / BASE_MPP)
    image = np.full((height, width, 3), GLASS, np.uint8)
    labels = np.zeros((height, width), np.uint8)
    for piece in scene.pieces:
        inside = np.zeros_like(labels)
        cv2.fillPoly(inside, [_blob(piece, rng)], 1)
        paper = _mirrored(textures[piece.texture], (height, width), rng)
        image[inside == 1] = paper[inside == 1]
        labels[inside == 1] = names.index(piece.texture) + 1
    if scene.pen:
        line = np.rint(np.array(scene.pen) / BASE_MPP).astype(np.int32)
        stroke = np.zeros_like(labels)
        cv2.polylines(stroke, [line], isClosed=False, color=1, thickness=max(1, round(scene.pen_um / BASE_MPP)))
        image[stroke == 1] = (image[stroke == 1] / 255.0 * PEN).astype(np.uint8)
        labels[stroke == 1] = PEN_LABEL
    return image, labels


def _blob(piece: Piece, rng: np.random.Generator) -> np.ndarray:
    """A closed curve of eight harmonics about a circle."""
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    k = np.arange(1, 9)[:, None]
    waves = rng.normal(0, 0.06, (8, 1)) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi, (8, 1)))
    radius = piece.radius_um * (1 + waves.sum(axis=0)) / BASE_MPP
    return np.rint(np.stack([piece.x_um / BASE_MPP + radius * np.cos(angle), piece.y_um / BASE_MPP + radius * np.sin(angle)], axis=1)).astype(
        np.int32
    )


def _mirrored(texture: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The texture mirror-tiled to `shape`, from a random offset."""
    indexes = []
    for length, side in zip(shape, texture.shape, strict=False):
        turn = (np.arange(length) + int(rng.integers(0, 2 * side))) % (2 * side)
        indexes.append(np.where(turn < side, turn, 2 * side - 1 - turn))
    return texture[np.ix_(*indexes)]


def restain(image: np.ndarray, seed: int) -> np.ndarray:
    """H&E pixels with other dyes: each stain's colour turned a little and its strength changed by up to a quarter."""
    rng = np.random.default_rng([seed, 7])
    other = STAINS + rng.normal(0, 0.04, STAINS.shape)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    unmix = np.linalg.pinv(STAINS)
    # What the two stains do not explain stays as it is.
    change = (unmix @ (rng.uniform(0.8, 1.25, (2, 1)) * other) + np.eye(3) - unmix @ STAINS).astype(np.float32)
    changed = np.empty_like(image)
    for rows in range(0, len(image), 256):
        density = -np.log((image[rows : rows + 256].astype(np.float32) + 1) / 244)
        changed[rows : rows + 256] = np.clip(np.rint(244 * np.exp(-density @ change) - 1), 0, 255)
    return changed


# ---- writers ----


def write_svs(
    path: Path,
    image: np.ndarray,
    *,
    mpp: float | None = 0.5,
    power: float | None = 20,
    downsamples: tuple[int, ...] = (4, 16),
    ceil_levels: bool = False,
    tile_px: int = 256,
    quality: int = 80,
) -> Path:
    """As Aperio writes: level 0, a thumbnail in strips, the smaller levels; mpp and power in the description."""
    height, width = image.shape[:2]
    about = f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px}) JPEG/RGB Q={quality}"
    about += (f"|AppMag = {power:g}" if power else "") + (f"|MPP = {mpp:.4f}" if mpp else "")
    tiled = {"tile": (tile_px, tile_px), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality}, "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, description=about, **tiled)
        thumbnail = _reduced(image, max(1, max(width, height) // 256), False)
        tiff.write(thumbnail, description=about, photometric="rgb", compression="jpeg", rowsperstrip=16, metadata=None)
        for downsample in downsamples:
            tiff.write(_reduced(image, downsample, ceil_levels), description=about, **tiled)
    return path


def write_tiff(
    path: Path,
    image: np.ndarray,
    *,
    mpp: float | tuple[float, float] | None = 0.5,
    dpi: float | None = None,
    downsamples: tuple[int, ...] = (4, 16),
    ceil_levels: bool = False,
    tile_px: int = 256,
    quality: int = 80,
    compression: str = "jpeg",
) -> Path:
    """A pyramid that no vendor claims. mpp, one or (x, y), is in the resolution tags, or `dpi` is."""
    tiled = {"tile": (tile_px, tile_px), "photometric": "rgb", "compression": compression, "metadata": None}
    if compression == "jpeg":
        tiled["compressionargs"] = {"level": quality}
    if dpi is not None:
        tiled |= {"resolution": (dpi, dpi), "resolutionunit": "inch"}
    mpps = None if dpi is not None or mpp is None else (mpp if isinstance(mpp, tuple) else (mpp, mpp))
    with tifffile.TiffWriter(path) as tiff:
        for downsample in (1, *downsamples):
            if mpps is not None:
                tiled |= {"resolution": tuple(1e4 / (m * downsample) for m in mpps), "resolutionunit": "centimeter"}
            tiff.write(_reduced(image, downsample, ceil_levels), subfiletype=0 if downsample == 1 else 1, **tiled)
    return path


def write_ome(
    path: Path,
    image: np.ndarray,
    *,
    mpp: float | None = 0.5,
    unit: str = "µm",
    downsamples: tuple[int, ...] = (4, 16),
    tile_px: int = 256,
    quality: int = 80,
) -> Path:
    """OME-TIFF as Bio-Formats writes it: smaller levels in SubIFDs, the pixel's size (`mpp`, microns) in the XML in `unit` (µm, nm, mm)."""
    tiled = {"tile": (tile_px, tile_px), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality}}
    about = {"axes": "YXS"}
    if mpp is not None:
        size = mpp * {"µm": 1, "nm": 1e3, "mm": 1e-3}[unit]
        about |= {"PhysicalSizeX": size, "PhysicalSizeY": size, "PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, subifds=len(downsamples), metadata=about, **tiled)
        for downsample in downsamples:
            tiff.write(_reduced(image, downsample, False), subfiletype=1, metadata=None, **tiled)
    return path


def write_encoded(path: Path, image: np.ndarray, encode: Callable[[np.ndarray], bytes], *, photometric: int, tile_px: int = 256) -> Path:
    """One level of tiles as `encode` makes them; `photometric` (2 RGB, 6 YCbCr) is what the tag says. Sides must divide by `tile_px`."""
    tiles = (image[y : y + tile_px, x : x + tile_px] for y in range(0, image.shape[0], tile_px) for x in range(0, image.shape[1], tile_px))
    stored = {"shape": image.shape, "dtype": np.uint8, "tile": (tile_px, tile_px), "compression": "jpeg", "photometric": "ycbcr", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write((encode(tile) for tile in tiles), resolution=(2e4, 2e4), resolutionunit="centimeter", **stored)
    with tifffile.TiffFile(path, mode="r+") as tiff:  # which writes YCbCr itself wherever it writes JPEG
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(photometric)
    return path


def _reduced(image: np.ndarray, downsample: int, ceil: bool) -> np.ndarray:
    if downsample == 1:
        return image
    height, width = (-(-side // downsample) if ceil else side // downsample for side in image.shape[:2])
    return cv2.resize(image, (max(1, width), max(1, height)), interpolation=cv2.INTER_AREA)


# ---- damage ----


def stored_tile(path: Path, place: tuple[int, int], *, page: int = 0) -> tuple[int, int]:
    """Offset and length, in bytes, of the stored tile that holds the px `place` (x, y) of a page."""
    with tifffile.TiffFile(path) as tiff:
        stored = tiff.pages[page]
        across = -(-stored.imagewidth // stored.tilewidth)
        index = place[1] // stored.tilelength * across + place[0] // stored.tilewidth
        return stored.dataoffsets[index], stored.databytecounts[index]


def zero_tile(path: Path, place: tuple[int, int], *, page: int = 0) -> None:
    """Overwrite one stored tile with zeros."""
    offset, length = stored_tile(path, place, page=page)
    _overwrite(path, offset, length)


def half_zero_tile(path: Path, place: tuple[int, int], *, page: int = 0) -> None:
    """Overwrite the second half of one stored tile with zeros, as a copy that was cut short leaves it."""
    offset, length = stored_tile(path, place, page=page)
    _overwrite(path, offset + length // 2, length - length // 2)


def _overwrite(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))


def cut(path: Path, share: float = 2 / 3) -> None:
    """Keep only the first `share` of a file."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
