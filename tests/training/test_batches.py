"""From the plan to messages and notes, with real images on disk, and a real step of GradCache on what comes out."""

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError, Ref
from pipeline.media import decode
from pipeline.pairs.prepare import Dataset, prepare
from pipeline.training.batches import Choice, collate, read, source_of
from pipeline.training.chunks import Rows
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE
from pipeline.training.plan import Mixture, Plan
from pipeline.vlm.message import MARKER
from tests.pairs.writing import jsonl, pictures


def images(folder, num=12, **given):
    """A data set of images with captions, two images a caption."""
    pictures(folder, *(f"{row}.png" for row in range(num)))
    rows = [
        {"qry": "<|image_1|> what?", "qry_image_path": f"{row}.png", "pos_text": f"caption {row // 2}", "pos_image_path": "", "neg_text": "no"}
        for row in range(num)
    ]
    reader = Ref(target="pipeline.pairs.mmeb:Mmeb", args={"uri": jsonl(folder / "images.jsonl", rows)})
    return prepare(Dataset(name="images", reader=reader, instruction_q="Describe.", **given), str(folder / "cache"))


def texts(folder, num=20, **given):
    """A data set of texts with three positives, up to three negatives and scores."""
    rows = [
        {
            "query": f"query {row}",
            "pos": [f"p{row}.{k}" for k in range(3)],
            "neg": [f"n{row}.{k}" for k in range(row % 4)],
            "pos_scores": [1.0, 2.0, 3.0],
            "neg_scores": [0.1 * k for k in range(row % 4)],
        }
        for row in range(num)
    ]
    reader = Ref(target="pipeline.pairs.flag:Flag", args={"uri": jsonl(folder / "texts.jsonl", rows)})
    return prepare(Dataset(name="texts", reader=reader, instruction_d="Passage.", **given), str(folder / "cache"))


PLAIN = Choice()


def taken(prepared, rows, choice=PLAIN, epoch=0):
    return collate(prepared.take(np.array(rows)), np.full(len(rows), epoch), choice, step=5)


def test_rows_become_messages_with_their_images_and_the_instruction_apart(tmp_path):
    batch = taken(images(tmp_path), [3, 0])
    assert [told.message.text for told in batch.queries] == [f"{MARKER}what?"] * 2
    assert {told.instruction for told in batch.queries} == {"Describe."} and {told.instruction for told in batch.positives} == {""}
    wanted = decode((tmp_path / "3.png").read_bytes(), Choice().limits)
    assert np.array_equal(batch.queries[0].message.images[0], wanted) and wanted[0, 0, 0] == 30
    assert [told.message.text for told in batch.positives] == ["caption 1", "caption 0"]
    assert [[told.message.text for told in own] for own in batch.negatives] == [["no"], ["no"]]
    assert batch.notes.step == 5 and batch.rejects.num_rows == 0


def test_equal_documents_queries_and_groups_have_equal_keys(tmp_path):
    notes = taken(images(tmp_path), [0, 1, 2]).notes
    assert notes.positive_keys[0] == notes.positive_keys[1] != notes.positive_keys[2]
    assert notes.negative_keys.shape == (3, 1) and len(set(notes.negative_keys.flatten().tolist())) == 1
    assert len(set(notes.groups.tolist())) == 3
    assert notes.in_batch_negatives.tolist() == [True] * 3 and notes.groups.dtype == torch.int64


def test_a_data_set_without_in_batch_negatives_says_so_in_the_notes(tmp_path):
    notes = taken(images(tmp_path, in_batch_negatives=False), [0, 1]).notes
    assert notes.in_batch_negatives.tolist() == [False, False]


def test_one_positive_and_the_negatives_are_drawn_by_seed_epoch_and_row(tmp_path):
    prepared = texts(tmp_path)
    rows = [3, 7, 11, 15, 19]
    choice = Choice(max_negatives=2)

    def drawn(choice, epoch):
        batch = taken(prepared, rows, choice, epoch)
        assert all(len(own) == 2 for own in batch.negatives)
        return [told.message.text for told in batch.positives] + [told.message.text for own in batch.negatives for told in own]

    assert drawn(choice, 0) == drawn(choice, 0)
    assert drawn(choice, 0) != drawn(choice, 1) and drawn(choice, 0) != drawn(Choice(max_negatives=2, seed=1), 0)
    seen = {taken(prepared, [3], choice, epoch).positives[0].message.text for epoch in range(40)}
    assert seen == {"p3.0", "p3.1", "p3.2"}
    alone = taken(prepared, [7], choice, 4).positives[0]
    assert alone == taken(prepared, rows, choice, 4).positives[1]


def test_all_answers_of_a_row_stand_in_its_notes(tmp_path):
    prepared = texts(tmp_path)
    notes = taken(prepared, [3, 7]).notes
    wanted = prepared.keys()["positive_keys"].take([3, 7]).to_pylist()
    assert notes.answer_keys.tolist() == wanted and all(len(own) == 3 for own in wanted)
    assert all(key in own for key, own in zip(notes.positive_keys.tolist(), wanted, strict=True))


def test_rows_with_different_numbers_of_negatives_have_padded_keys_and_scores(tmp_path):
    batch = taken(texts(tmp_path), [0, 3, 1], Choice(teacher_scores=True))
    assert [len(own) for own in batch.negatives] == [0, 3, 1]
    assert batch.notes.negative_keys.shape == (3, 3)
    assert batch.notes.teacher_scores.shape == (3, 4)
    assert batch.notes.teacher_scores[1, 1:].tolist() == pytest.approx([0.0, 0.1, 0.2])
    picked = int(batch.positives[1].message.text[-1])
    assert batch.notes.teacher_scores[1, 0] == picked + 1
    with pytest.raises(ConfigError, match="no teacher's scores"):
        taken(images(tmp_path), [0], Choice(teacher_scores=True))
    without = taken(texts(tmp_path), [0, 4])
    assert without.negatives == [] and without.notes.negative_keys is None


def test_an_image_that_vanished_names_its_row_or_leaves_it_out(tmp_path):
    prepared = images(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ConfigError, match=r"images.jsonl#1: missing: .*1.png.*bad_image: drop"):
        taken(prepared, [0, 1, 2])
    batch = taken(prepared, [0, 1, 2, 3], Choice(bad_image="drop"))
    assert len(batch.queries) == len(batch.positives) == len(batch.negatives) == len(batch.notes.positive_keys) == 2
    found = [(row["uri"].rpartition("#")[2], row["reason"]) for row in batch.rejects.to_pylist()]
    assert found == [("1", "missing"), ("2", "bad_image")]
    none = taken(prepared, [1, 2], Choice(bad_image="drop"))
    assert none.queries == none.negatives == [] and none.notes.positive_keys.dtype == torch.int64 and none.rejects.num_rows == 2


def test_a_plan_over_prepared_data_sets_trains(tmp_path):
    """Two kinds of data in one batch, no caption twice in a block, the same rows whatever number of workers, and a loss with a gradient."""
    prepared = {one.name: one for one in (images(tmp_path), texts(tmp_path))}
    sources = [source_of(one, None) for one in prepared.values()]
    plan = Plan(sources, Mixture(batch_size=8, batches="interleaved", interleave=4, bucket_batches=1))
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 8)

    def embed(rows):
        features = torch.zeros(len(rows), 64)
        for at, told in enumerate(rows):
            for letter in told.message.text + told.instruction:
                features[at, ord(letter) % 48] += 1
            for image in told.message.images:
                features[at, 48 + int(image[0, 0, 0]) // 10] += 5
        return model(features)

    cache = GradCache(embed, InfoNCE(0.1), [model], Rows(3))
    for step in range(10):
        draw = plan.batch(step)
        whole = read(prepared, plan.names, draw)
        parts = [read(prepared, plan.names, draw.part(rank, 3)) for rank in range(3)]
        ids = whole["row_id"].to_pylist()
        assert all(part["row_id"].to_pylist() == ids[rank::3] for rank, part in enumerate(parts))
        for block in (ids[:4], ids[4:]):
            keys = [row["positive_keys"][0] for row in whole.to_pylist() if row["row_id"] in block and row["task"] == "images"]
            assert len(set(keys)) == len(keys)
        batch = collate(whole, draw.epoch, Choice(), step=step)
        loss = cache.step(batch.queries, batch.positives, negatives=batch.negatives, notes=batch.notes)
        assert torch.isfinite(loss) and loss > 0
    assert model.weight.grad.abs().max() > 0
