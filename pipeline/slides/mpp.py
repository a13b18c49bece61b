"""Microns per pixel of level 0: where a slide says it, which of its sayings to believe, and what cannot be true."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

PLAUSIBLE = (0.05, 20.0)
"""Of level 0, um/px. Software that knows no density writes 72 or 96 dots per inch: 353 and 265 um/px."""
ANISOTROPIC = 0.02
DISAGREES = 0.01
MM, CM, INCH = 1e3, 1e4, 25.4e3
OME_UNITS = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": MM, "cm": CM, "m": 1e6, "in": INCH}
UNITS = {2: INCH, 3: CM}
"""TIFF's ResolutionUnit, in microns."""


@dataclass(frozen=True)
class Mpp:
    """`x`, `y`: None if nothing said is believable. `flags`: anisotropic, disagrees, implausible. `notes`: for a person."""

    x: float | None
    y: float | None
    source: str | None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


Said = tuple[str, float, float]
"""Source, x, y."""


def settle(said: list[Said], *, user: float | None = None, objective: float | None = None) -> Mpp:
    """The first believable of: the user's value, what the file says in the order of `said`, 10 / the objective's power (an estimate).

    A file that differs from the user's value by more than 1 % is flagged, not believed. Where x and y differ by more than 2 %
    both stay as they are, flagged; their geometric mean is then the scale to use (`SlideInfo.mpp`).
    """
    flags, notes, believed = list[str](), list[str](), list[Said]()
    for source, x, y in said:
        if _plausible(x) and _plausible(y):
            believed.append((source, x, y))
        else:
            notes.append(f"{source} says {x:g} x {y:g} um/px, which no scanner has; ignored")
            flags.append("implausible")
    if user is not None:
        mean = math.sqrt(believed[0][1] * believed[0][2]) if believed else user
        if abs(mean / user - 1) > DISAGREES:
            flags.append("disagrees")
            notes.append(f"{believed[0][0]} says {mean:.5g} um/px; the {user:g} that was given is used")
        believed.insert(0, ("user", user, user))
    elif not believed and objective and _plausible(10 / objective):
        believed.append(("objective", 10 / objective, 10 / objective))
        notes.append(f"um/px is estimated from the objective, {objective:g}x")
    if not believed:
        return Mpp(None, None, None, _unique(flags), tuple(notes))
    source, x, y = believed[0]
    if abs(x - y) / x > ANISOTROPIC:
        flags.append("anisotropic")
        notes.append(f"px are not square: {x:.5g} x {y:.5g} um")
    return Mpp(x, y, source, _unique(flags), tuple(notes))


def _plausible(mpp: float) -> bool:
    return PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]


def _unique(flags: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(flags))


def said_by(properties: Mapping[str, str], *, description: str = "", resolution: tuple[float, float, int] | None = None) -> list[Said]:
    """What a file says, most trusted first: the vendor's code in OpenSlide, the vendor's own keys, the TIFF's resolution tags.

    For a TIFF that no vendor claims OpenSlide's own value is the resolution tags, so it counts as those, after an OME description.
    """
    native = _pair("openslide", properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
    generic = properties.get("openslide.vendor") == "generic-tiff"
    said = [] if generic else native
    said += _pair("aperio.MPP", properties.get("aperio.MPP"), properties.get("aperio.MPP"))
    said += _philips(properties.get("philips.DICOM_PIXEL_SPACING", ""))
    said += _ome(description)
    if resolution is not None and resolution[2] in UNITS and resolution[0] > 0 and resolution[1] > 0:
        per_unit = UNITS[resolution[2]]
        said.append(("tiff", per_unit / resolution[0], per_unit / resolution[1]))
    elif generic:
        said += [("tiff", x, y) for _, x, y in native]
    return said


def _pair(source: str, x: str | None, y: str | None) -> list[Said]:
    one, other = number(x), number(y)
    return [(source, one, other)] if one and other else []


def number(text: str | None) -> float | None:
    """A positive finite number, with a decimal point or comma; None for anything else."""
    try:
        value = float((text or "").strip().replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _philips(text: str) -> list[Said]:
    """DICOM's PixelSpacing: millimetres between rows, then between columns."""
    parts = [number(part) for part in re.findall(r"[\d.eE+-]+", text)]
    return [("philips.DICOM_PIXEL_SPACING", parts[1] * MM, parts[0] * MM)] if len(parts) == 2 and parts[0] and parts[1] else []


def _ome(description: str) -> list[Said]:
    if "PhysicalSizeX" not in description:
        return []
    try:
        root = ET.fromstring(description)
    except ET.ParseError:
        return []
    pixels = next((element for element in root.iter() if element.tag.endswith("}Pixels")), None)
    if pixels is None:
        return []
    x, y = (number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY")
    units = [OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").replace("μ", "µ")) for axis in "XY"]
    return [("ome.PhysicalSize", x * units[0], y * units[1])] if x and y and units[0] and units[1] else []


def aperio_properties(description: str) -> dict[str, str]:
    """The `key = value` parts of Aperio's description, named as OpenSlide names them."""
    parts = (part.partition("=") for part in description.split("|")[1:])
    return {f"aperio.{key.strip()}": value.strip() for key, _, value in parts if key.strip()}
