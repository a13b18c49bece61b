"""The demonstration's split of emoji: by concept, so that no near-duplicate of a held-out one is trained on."""

import json

import pytest

from demo.emoji_assets import concept, split


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("man running facing right", "woman running"),
        ("woman: blond hair", "person: blond hair"),
        ("backhand index pointing up", "index pointing up"),
        ("man\u2019s shoe", "mans shoe"),
        ("family: man, woman, girl", "family: woman, boy"),
    ],
)
def test_variants_are_of_one_concept(left, right):
    assert concept(left) == concept(right)


def test_others_are_not():
    assert len({concept(name) for name in ("red heart", "blue heart", "dog", "hot dog", "man", "ten o\u2019clock")}) == 6
    assert concept("woman") == concept("man") == "person"


def test_no_concept_is_on_both_sides_and_no_row_is_lost(tmp_path):
    rows = [{"text": f"{who} {what}", "image": f"{who}-{what}.png", "concept": what} for what in range(50) for who in ("man", "woman")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert split(tmp_path, tmp_path / "out", seed=1) == (80, 20)
    sides = [[json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "held")]
    train, held = ({text.split()[1] for text in side} for side in sides)
    assert not train & held and len(train) == 40 and len(held) == 10
    split(tmp_path, tmp_path / "other", seed=2)
    assert (tmp_path / "other" / "held.jsonl").read_text() != (tmp_path / "out" / "held.jsonl").read_text()
