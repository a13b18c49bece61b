"""GradCache in one process: the gradient of the plain batch, whatever the chunks."""

import copy
import random

import pytest
import torch
from torch import nn

from pipeline.training import NO_NOTES, Notes
from pipeline.training.chunks import Budget, Rows
from pipeline.training.distillation import KL
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE
from pipeline.training.matryoshka import Ladder, Matryoshka
from pipeline.training.siglip import SigLIP
from pipeline.training.sum import Sum
from pipeline.training.temperature import Bias, Temperature
from pipeline.training.triplet import BatchHard
from tests.training.towers import Text, Visual, gradients, images, made, ragged, texts, worst

ROWS = 13
QUERIES, POSITIVES, NEGATIVES = texts(ROWS, 1), texts(ROWS, 2), ragged(ROWS, 3)
CHUNKS = [Rows(1), Rows(4), Rows(1_000), Budget(20, len)]


def step(module, loss, chunk, batch=(QUERIES, POSITIVES, NEGATIVES), notes=NO_NOTES, **more):
    module.zero_grad(), loss.zero_grad()
    queries, positives, *negatives = batch
    value = GradCache(module, loss, [module], chunk, **more).step(queries, positives, negatives=negatives[0] if negatives else (), notes=notes)
    return value, gradients(module, loss)


@pytest.mark.parametrize(
    "loss",
    [
        InfoNCE(Temperature(), directions=("query-document", "document-query")),
        SigLIP(Temperature(0.1), Bias()),
        Matryoshka(Sum((1.0, InfoNCE(Temperature())), (0.3, BatchHard())), (2, 4)),
        Sum((0.2, InfoNCE()), (1.0, KL())),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_any_chunks_give_the_gradient_of_the_plain_batch(loss):
    module, loss = made(Text()), loss.double()
    notes = Notes(teacher_scores=torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)))
    value, wanted = step(module, loss, None, notes=notes)
    flat = [row for own in NEGATIVES for row in own]
    vectors = module([*QUERIES, *POSITIVES, *flat])
    dense = torch.zeros(ROWS, 3, 8, dtype=torch.float64)
    has = torch.tensor([[k < len(own) for k in range(3)] for own in NEGATIVES])
    dense[has] = vectors[2 * ROWS :]
    module.zero_grad(), loss.zero_grad()
    plain = loss(vectors[:ROWS], vectors[ROWS : 2 * ROWS], dense, Notes(has_negative=has, teacher_scores=notes.teacher_scores))
    plain.backward()
    assert abs(plain.item() - value.item()) < 1e-12
    assert worst(wanted, gradients(module, loss)) < 1e-12
    for chunk in CHUNKS:
        found_value, found = step(module, loss, chunk, notes=notes)
        assert abs(found_value.item() - value.item()) < 1e-12
        assert worst(wanted, found) < 1e-12
        assert not found_value.requires_grad


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_layers_go_through_chunks_to_the_ladder(chunk):
    module, loss = made(Text(layers=True, blocks=3)), Ladder(InfoNCE(Temperature()), ((0, 3), (1, 6)), alignment=0.5).double()
    value, wanted = step(module, loss, None)
    found_value, found = step(module, loss, chunk)
    assert abs(found_value.item() - value.item()) < 1e-12
    assert worst(wanted, found) < 1e-12


@pytest.mark.parametrize("chunk", [Rows(3), Budget(40, lambda row: len(row[0]) + row[2][0] * row[2][1])], ids=["rows", "budget"])
def test_images_of_different_grids_stay_with_their_rows(chunk):
    """Joined patches cut like a batch dimension train one row with another's image; rows are collated per chunk instead."""
    module, loss = made(Visual()), InfoNCE(Temperature()).double()
    batch = (images(ROWS, 1), images(ROWS, 2))
    value, wanted = step(module, loss, None, batch)
    found_value, found = step(module, loss, chunk, batch)
    assert abs(found_value.item() - value.item()) < 1e-12
    assert worst(wanted, found) < 1e-12


def test_two_towers_have_chunks_of_their_own():
    left, right, loss = made(Text(), 1), made(Visual(), 2), InfoNCE(Temperature()).double()
    found = []
    for chunk in (None, Rows(5)):
        for module in (left, right, loss):
            module.zero_grad()
        GradCache(left, loss, [left, right], chunk, embed_documents=right).step(QUERIES, images(ROWS, 2))
        found.append(gradients(left, right, loss))
    assert worst(*found) < 1e-12


@pytest.mark.parametrize("embed_frozen", ["documents", "queries"])
def test_a_frozen_tower_stays_without_gradient(embed_frozen):
    left, right, loss = made(Text(), 1), made(Text(), 2), InfoNCE().double()
    (right if embed_frozen == "documents" else left).requires_grad_(False)
    found = []
    for chunk in (None, Rows(5)):
        left.zero_grad(), right.zero_grad()
        GradCache(left, loss, [left, right], chunk, embed_documents=right).step(QUERIES, POSITIVES)
        found.append(gradients(left, right))
    assert worst(*found) < 1e-12


def test_dropout_falls_alike_in_both_passes():
    """Compared with the same chunks, drawn from the same seed, with all their graphs kept."""
    module, loss = made(Text(dropout=0.3)), InfoNCE(Temperature()).double()
    rows = [*QUERIES, *POSITIVES]
    torch.manual_seed(5)
    vectors = torch.cat([module(rows[start : start + 4]) for start in range(0, len(rows), 4)])
    loss(vectors[:ROWS], vectors[ROWS:]).backward()
    wanted, after = gradients(module, loss), torch.rand(1)
    torch.manual_seed(5)
    _, found = step(module, loss, Rows(4), (QUERIES, POSITIVES))
    assert worst(wanted, found) < 1e-12
    assert torch.rand(1) == after, "the generator must stand where one pass leaves it"


def test_autocast_reaches_both_passes():
    module, loss = Text(), InfoNCE(Temperature())
    with torch.autocast("cpu", torch.bfloat16):
        _, wanted = step(module, loss, None)
        _, found = step(module, loss, Rows(4))
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() < 0.03 * grad.norm(), name
    _, exact = step(module, loss, None)
    assert worst(exact, wanted) > 1e-5, "autocast must have had an effect"


def test_gradients_are_added_to_those_there():
    module, loss = made(Text()), InfoNCE().double()
    _, one = step(module, loss, Rows(4))
    cache = GradCache(module, loss, [module], Rows(4))
    cache.step(QUERIES, POSITIVES, negatives=NEGATIVES)
    assert worst({name: 2 * grad for name, grad in one.items()}, gradients(module, loss)) < 1e-12


def test_a_step_learns():
    torch.manual_seed(0)
    module = Text(dim=16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    cache, values = GradCache(module, InfoNCE(0.1), [module], Rows(4)), []
    for _ in range(30):
        optimizer.zero_grad()
        values.append(cache.step(QUERIES, POSITIVES).item())
        optimizer.step()
    assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize(("norm", "is_refused"), [(nn.BatchNorm1d, True), (nn.LayerNorm, False)])
def test_batch_statistics_are_refused_while_they_train(norm, is_refused):
    module = nn.Sequential(made(Text()), norm(8).double())
    if is_refused:
        with pytest.raises(ValueError, match="1 is a BatchNorm1d in training mode"):
            step(module, InfoNCE(), Rows(4))
        step(module, InfoNCE(), None)
        module[1].eval()
    step(module, InfoNCE(), Rows(4))


def test_an_encoder_with_randomness_of_its_own_is_found():
    class Noisy(Text):
        def forward(self, rows):
            return super().forward(rows) * random.choice([0.5, 1.0, 2.0])

    random.seed(0)
    with pytest.raises(RuntimeError, match="second pass"):
        step(made(Noisy()), InfoNCE(), Rows(4))


@pytest.mark.parametrize("batch", [([], []), (QUERIES, POSITIVES[:3]), (QUERIES, POSITIVES, NEGATIVES[:2])], ids=["none", "positives", "negatives"])
def test_rows_that_do_not_fit_are_refused(batch):
    with pytest.raises(ValueError, match="positives and negatives"):
        step(made(Text()), InfoNCE(), Rows(4), batch)


def test_an_encoder_that_loses_rows_is_found():
    with pytest.raises(ValueError, match=r"must give \(4, dim\)"):
        GradCache(lambda rows: torch.zeros(len(rows) - 1, 3), InfoNCE(), [], Rows(4)).step(QUERIES, POSITIVES)


def test_chunks_hold_each_row_once_and_keep_the_budget():
    lengths = [len(row) for row in QUERIES]
    for chunk in CHUNKS:
        chunks = chunk.cut(QUERIES)
        assert sorted(row for rows in chunks for row in rows) == list(range(ROWS))
    for rows in Budget(20, len).cut(QUERIES):
        assert len(rows) * max(lengths[row] for row in rows) <= 20
    assert [len(rows) for rows in Budget(5, len).cut([[0] * 9, [0], [0]])] == [1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        Rows(0)


def test_the_same_object_is_not_changed_by_a_step():
    module = made(Text())
    before = copy.deepcopy(module.state_dict())
    step(module, InfoNCE(), Rows(4))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("chunk", [None, Rows(4)], ids=str)
def test_weights_that_are_no_numbers_are_told_as_such(chunk):
    """NaN in the vectors passed for an encoder whose second pass differs from its first, an error that a run tried four times."""
    module = made(Text())
    next(module.parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step(module, InfoNCE().double(), chunk)
    assert set(gradients(module).values()) == {None}
