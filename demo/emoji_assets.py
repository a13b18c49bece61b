"""Fetch 1,641 emoji pictures with words for each: `python -m demo.emoji_assets`. They land in `demo/assets/emoji/` (not in git):

    *.png         pictures of 64 pixels (npm emoji-datasource-google; Noto art, Apache-2.0)
    pairs.jsonl   text (name and tags; npm openmoji, CC-BY-SA-4.0), image, concept

Both are npm packages, pinned by version and sha256, so npm is needed once. Flags are left out: they are words of another kind.
"""

import csv
import json
import random
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from demo.assets import ASSETS
from demo.packages import Unavailable, npm, once

PICTURES = ("emoji-datasource-google@16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
WORDS = ("openmoji@17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")

VARIANTS = re.compile(
    r"(wo)?m[ae]n|person|people|boys?|girls?|child|adult|left|right|facing|(left|right)wards|(left|right)-facing|up|down|(up|down)-(left|right)|backhand"
)
"""Words that tell emoji of one concept apart, such as `man running` and `woman running facing right`."""


def fetch(folder: Path = ASSETS) -> Path:
    """The folder of the emoji; downloads them if they are missing. Raises Unavailable naming the package that cannot be had."""
    once(folder / "emoji", _emoji, by=__file__)
    return folder / "emoji"


def split(folder: Path, target: Path, *, seed: int, held_out: float = 0.2) -> tuple[int, int]:
    """Write train.jsonl and held.jsonl, a share of the concepts, into `target`; their numbers of rows. Pictures are named by absolute paths.

    By concept: of near-duplicates none is in both, where a split by chance would put them.
    """
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    concepts = sorted({row["concept"] for row in rows})
    random.Random(seed).shuffle(concepts)
    held = set(concepts[: round(held_out * len(concepts))])
    target.mkdir(parents=True, exist_ok=True)
    counts = []
    for name, wanted in (("train", False), ("held", True)):
        lines = [
            json.dumps({"text": row["text"], "image": str((folder / row["image"]).absolute())}, ensure_ascii=False)
            for row in rows
            if (row["concept"] in held) == wanted
        ]
        (target / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        counts.append(len(lines))
    return counts[0], counts[1]


def concept(name: str) -> str:
    """What an emoji is of, whoever does it and wherever it looks: its name's words without VARIANTS, in alphabetical order."""
    words = {word for word in re.split(r"[^a-z0-9-]+", name.lower().replace("\u2019", "")) if word and not VARIANTS.fullmatch(word)}
    return " ".join(sorted(words)) or "person"


def _emoji(made: Path, downloads: Path) -> None:
    for name in ("words", "pictures"):
        (downloads / name).mkdir()
    words = npm(*WORDS, downloads / "words")
    pictures = npm(*PICTURES, downloads / "pictures")
    with tarfile.open(words) as package:
        package.extract("package/data/openmoji.csv", downloads, filter="data")
    with tarfile.open(pictures) as package:
        package.extractall(downloads, [each for each in package if _is_wanted(each.name)], filter="data")
    rows = list(_rows(downloads / "package"))
    for row in rows:
        shutil.copyfile(downloads / "package" / "img" / "google" / "64" / row["image"], made / row["image"])
    (made / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _is_wanted(name: str) -> bool:
    return name == "package/emoji.json" or name.startswith("package/img/google/64/")


def _rows(package: Path) -> Iterator[dict[str, str]]:
    with (package / "data" / "openmoji.csv").open(encoding="utf-8", newline="") as file:
        words = {_code(row["hexcode"]): row for row in csv.DictReader(file)}
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        found = words.get(_code(emoji["unified"]))
        if found is not None and emoji["has_img_google"] and emoji["category"] != "Flags":
            name, tags = found["annotation"], found["tags"]
            yield {"text": f"{name}: {tags}" if tags else name, "image": emoji["image"], "concept": concept(name)}


def _code(hexadecimal: str) -> str:
    """Code points without the variation selector, which one package writes and the other leaves out."""
    return hexadecimal.upper().replace("-FE0F", "")


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as unavailable:
        raise SystemExit(f"demo.emoji_assets: {unavailable}") from None
