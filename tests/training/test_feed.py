"""The rows of a worker, read and prepared ahead of its steps."""

import time

import numpy as np
import pytest

from pipeline.config import ConfigError, Ref
from pipeline.pairs.prepare import Dataset, prepare
from pipeline.training.batches import Choice
from pipeline.training.feed import Feed, Part, Reader
from pipeline.training.plan import Mixture
from pipeline.training.settings import Feeding
from pipeline.training.vlm import TrainVlm
from tests.pairs.writing import jsonl, picture, pictures
from tests.vlm.models import save_model

STEPS = 7


class Slow:
    """Stands for a model: a row is its text and its images' sums, and takes a time of its own, so that threads finish out of order."""

    def __init__(self):
        self.seen = []

    def prepare(self, told, *, query):
        time.sleep(hash(told.message.text) % 5 / 1000)
        self.seen.append(told.message.text)
        return told.message.text, [int(image.astype(np.int64).sum()) for image in told.message.images], query


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    pictures(folder, *(f"{row}.png" for row in range(20)))
    rows = [{"qry": f"<|image_1|> {row}", "qry_image_path": f"{row}.png", "pos_text": f"caption {row}", "neg_text": "no"} for row in range(20)]
    reader = Ref(target="pipeline.pairs.mmeb:Mmeb", args={"uri": jsonl(folder / "train.jsonl", rows)})
    return [Part(prepare(Dataset(name="x", reader=reader), str(folder / "cache")))]


def fed(parts, feeding, *, rank=0, num_ranks=1, first=0):
    read = Reader(tuple(parts), Mixture(batch_size=6), Choice(), rank, num_ranks).read
    with Feed(read, num_ranks=1, steps=STEPS, feeding=feeding, choice=Choice()) as feed:
        model = Slow()
        found = [feed.at(step, model) for step in range(first, STEPS)]
    return [(ready.queries, ready.positives, ready.negatives, ready.row_keys, ready.notes.positive_keys.tolist()) for ready in found], model


def test_rows_are_the_same_however_many_threads_make_them_ready(parts):
    wanted, model = fed(parts, Feeding(ahead=1, threads=1))
    assert len(model.seen) == STEPS * 6 * 3, "nothing is made ready that no step takes"
    for feeding in (Feeding(), Feeding(ahead=5, threads=4)):
        assert fed(parts, feeding)[0] == wanted
    assert fed(parts, Feeding(ahead=3, threads=3), first=4)[0] == wanted[4:]
    both = [fed(parts, Feeding(ahead=3, threads=3), rank=rank, num_ranks=2)[0] for rank in (0, 1)]
    for step in range(STEPS):
        assert [both[place % 2][step][3][place // 2] for place in range(6)] == wanted[step][3]


def test_a_bad_image_ends_the_run_at_its_own_step(parts, tmp_path):
    class Bad(Slow):
        def prepare(self, told, *, query):
            if told.message.text.endswith("caption 7"):
                raise ConfigError("row 7")
            return super().prepare(told, query=query)

    wanted, _ = fed(parts, Feeding())
    step = next(place for place, ready in enumerate(wanted) if any(positive[0] == "caption 7" for positive in ready[1]))
    read = Reader(tuple(parts), Mixture(batch_size=6), Choice(), 0, 1).read
    with Feed(read, num_ranks=1, steps=STEPS, feeding=Feeding(ahead=6, threads=3), choice=Choice()) as feed:
        model = Bad()
        for each in range(step):
            feed.at(each, model)
        with pytest.raises(ConfigError, match="row 7"):
            feed.at(step, model)


def test_a_step_of_which_no_row_can_be_used_is_an_error_on_every_worker_and_otherwise_another_ones_row_stands_in(tmp_path):
    """An error on one worker alone, which the others wait for, or a result that depends on how many there are."""
    pictures(tmp_path, *(f"{row}.png" for row in range(4)))
    rows = [{"qry": f"<|image_1|> {row}", "qry_image_path": f"{row}.png", "pos_text": f"caption {row}"} for row in range(4)]
    source = Ref(target="pipeline.pairs.mmeb:Mmeb", args={"uri": jsonl(tmp_path / "train.jsonl", rows)})
    parts, choice = (Part(prepare(Dataset(name="x", reader=source), str(tmp_path / "cache"))),), Choice(bad_image="drop")
    readers = [Reader(parts, Mixture(batch_size=4), choice, rank, 2) for rank in (0, 1)]
    (good, *_), lost = ([int(key) for key in readers[rank].plan.batch(0).part(rank, 2).row] for rank in (0, 1))
    for row in {*range(4)} - {good}:
        (tmp_path / f"{row}.png").write_bytes(b"damaged")
    own, other = (first_step(reader, choice) for reader in readers)
    assert (len(own.queries), own.stand_in, own.rejects.num_rows) == (1, None, 1)
    assert (other.queries, other.stand_in[0], other.rejects.num_rows) == ([], own.queries[0], 2) and len(lost) == 2
    (tmp_path / f"{good}.png").unlink()
    for reader in readers:
        with pytest.raises(ConfigError, match=r"none of the rows of step 0 can be used; one of them: .*train.jsonl#\d"):
            first_step(reader, choice)


def first_step(reader, choice):
    with Feed(reader.read, num_ranks=2, steps=1, feeding=Feeding(), choice=choice) as feed:
        return feed.at(0, Slow())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("base") / "model", "qwen2_vl"))


@pytest.mark.parametrize(("size", "problem"), [((32, 32), "32 of them of 2 images"), ((900, 2), "aspect ratio")])
def test_images_that_the_model_cannot_take_name_their_row_or_leave_it_out(base, tmp_path, size, problem):
    """Images of more tokens than max_tokens ended the run with an error that named no row, also where bad images were to be dropped."""
    (tmp_path / "large.png").write_bytes(picture(9, size))
    chat = [{"role": "user", "content": [{"type": "image", "image": "large.png"}] * 2}]
    rows = [{"a": f"question {row}", "b": f"answer {row}", "c": "no", "d": None, "e": None} for row in range(1, 4)]
    rows = [{"a": chat, "b": "answer 0", "c": "no", "d": "neither", "e": "nor"}, *rows]
    rows[1]["d"] = "neither"
    reader = Ref(target="pipeline.pairs.sentence_transformers:SentenceTransformers", args={"uri": jsonl(tmp_path / "train.jsonl", rows)})
    parts = (Part(prepare(Dataset(name="x", reader=reader), str(tmp_path / "cache"))),)
    model = TrainVlm(base, sizes={"max_tokens": 22})
    for choice in (Choice(), Choice(bad_image="drop")):
        read = Reader(parts, Mixture(batch_size=4), choice, 0, 1).read
        with Feed(read, num_ranks=1, steps=1, feeding=Feeding(), choice=choice) as feed:
            if choice.bad_image == "error":
                with pytest.raises(ConfigError, match=rf"train.jsonl#0: .*{problem}.*bad_image: drop"):
                    feed.at(0, model)
                continue
            ready = feed.at(0, model)
    assert len(ready.queries) == len(ready.positives) == len(ready.negatives) == len(ready.notes.positive_keys) == 3
    assert ready.notes.negative_keys.shape == (3, 2), "as wide as the most negatives that a row still has"
    (reject,) = ready.rejects.to_pylist()
    assert reject["reason"] == "unfit" and reject["uri"].endswith("train.jsonl#0") and problem in reject["detail"]


def test_images_that_would_leave_no_room_for_text_are_refused_before_work_starts(base):
    """Qwen2-VL's own max_pixels lets an image take 16,384 tokens, max_tokens is 8,192: such an image ended the run, a lesser one cut the question."""
    TrainVlm(base, sizes={"max_tokens": 22})
    TrainVlm(base, sizes={"max_tokens": 8, "max_pixels": 6 * 64})
    with pytest.raises(ConfigError, match=r"max_pixels is 1024 .*16 tokens.*set sizes.max_pixels to 384 or less"):
        TrainVlm(base, sizes={"max_tokens": 8})
