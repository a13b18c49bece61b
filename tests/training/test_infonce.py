"""InfoNCE against a slow, obvious reference: one row, one column at a time, float64."""

import math

import pytest
import torch

from pipeline.training import Notes
from pipeline.training.blocks import sum_over_rows
from pipeline.training.check import sample
from pipeline.training.infonce import Hardness, InfoNCE, Ramp
from pipeline.training.temperature import Temperature

ROWS, DIM = 6, 5
TEMPERATURE = 0.1


def batch(num_negatives=2):
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    positives = (queries.detach() + torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)).requires_grad_()
    negatives = torch.randn(ROWS, num_negatives, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    return queries, positives, negatives


def cosine(left, right):
    return left @ right / (left.norm() * right.norm())


def reference(queries, positives, negatives, *, keep=lambda row, column: True, weigh=lambda row, column, s: 0.0):
    """Query to document. Columns are (row, None) for the positive of a row and (row, k) for its k-th negative."""
    columns = {(row, None): positives[row] for row in range(len(queries))}
    columns |= {(row, k): negatives[row, k] for row in range(len(queries)) for k in range(negatives.shape[1])}
    terms = []
    for row, query in enumerate(queries):
        denominator = 0
        for column, document in columns.items():
            s = cosine(query, document)
            if column == (row, None):
                denominator = denominator + torch.exp(s / TEMPERATURE)
            elif keep(row, column):
                denominator = denominator + torch.exp(s / TEMPERATURE + weigh(row, column, s.detach()))
        terms.append(denominator.log() - cosine(query, positives[row]) / TEMPERATURE)
    return sum(terms) / len(terms)


def assert_same(loss, wanted, leaves):
    assert loss.dtype == torch.float64
    assert abs(loss.item() - wanted.item()) < 1e-12
    for found, grad in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert (found - grad).abs().max() < 1e-12


def test_value_and_gradient_are_those_of_the_formula():
    sides = batch()
    assert_same(InfoNCE(TEMPERATURE)(*sides), reference(*sides), sides)


def test_rows_may_have_different_numbers_of_negatives():
    sides = batch()
    has = torch.tensor([[True, True], [False, False], [True, False], [False, True], [True, True], [False, False]])
    wanted = reference(*sides, keep=lambda row, column: column[1] is None or bool(has[column]))
    assert_same(InfoNCE(TEMPERATURE)(*sides, Notes(has_negative=has)), wanted, sides)


def test_documents_with_the_key_or_group_of_the_positive_are_no_negatives():
    sides = batch()
    keys, negative_keys = torch.tensor([10, 11, 10, 13, 14, 15]), torch.tensor([[20, 13], [20, 21], [22, 23], [24, 25], [11, 27], [28, 29]])
    groups = torch.tensor([0, 1, 2, 3, 3, 5])

    def keep(row, column):
        other, k = column
        key = keys[other] if k is None else negative_keys[other, k]
        return key != keys[row] and not (k is None and groups[other] == groups[row])

    notes = Notes(positive_keys=keys, negative_keys=negative_keys, groups=groups)
    assert_same(InfoNCE(TEMPERATURE)(*sides, notes), reference(*sides, keep=keep), sides)


def test_no_answer_of_a_query_is_its_negative_though_another_one_was_drawn():
    """Of a row with several positives one is drawn a step, and the others counted as wrong answers where another row brought them."""
    queries, positives, _ = sides = batch()
    keys, negative_keys = torch.arange(10, 16), torch.arange(20, 32).view(6, 2)
    answers = torch.tensor([[10, 11, 12], [11, 11, 11], [12, 25, 99], [13, 13, 13], [14, 98, 14], [15, 15, 97]])
    notes = Notes(positive_keys=keys, negative_keys=negative_keys, answer_keys=answers)

    def key(column):
        return keys[column[0]] if column[1] is None else negative_keys[column]

    def forth():
        return reference(*sides, keep=lambda row, column: key(column) not in answers[row])

    assert abs((forth() - reference(*sides)).item()) > 1e-3, "an answer must be dropped here"
    assert_same(InfoNCE(TEMPERATURE)(*sides, notes), forth(), sides)
    none = queries.new_zeros(ROWS, 0, DIM)
    back = reference(positives, queries, none, keep=lambda row, column: keys[row] not in answers[column[0]])
    both = (forth() + back) / 2
    assert_same(InfoNCE(TEMPERATURE, directions=("query-document", "document-query"))(*sides, notes), both, sides)


def test_a_document_closer_than_the_positive_by_the_margin_is_no_negative():
    queries, positives, negatives = sides = batch()

    def keep(row, column):
        document = positives[column[0]] if column[1] is None else negatives[column]
        return cosine(queries[row], document) <= cosine(queries[row], positives[row]) + 0.1

    wanted = reference(*sides, keep=keep)
    assert abs((wanted - reference(*sides)).item()) > 0.01, "the margin must drop something here"
    assert_same(InfoNCE(TEMPERATURE, false_negative_margin=0.1)(*sides), wanted, sides)


def test_a_row_without_in_batch_negatives_sees_its_own_only():
    sides = batch()
    off = torch.tensor([True, False, True, True, False, True])
    wanted = reference(*sides, keep=lambda row, column: bool(off[row]) or column[0] == row)
    assert_same(InfoNCE(TEMPERATURE)(*sides, Notes(in_batch_negatives=off)), wanted, sides)


@pytest.mark.parametrize("on", ["in-batch", "own", "all"])
def test_hardness_is_added_to_the_negatives_it_names(on):
    sides = batch()

    def weigh(row, column, s):
        return 3.0 * s if on == "all" or (on == "own") == (column[0] == row) else 0.0

    assert_same(InfoNCE(TEMPERATURE, hardness=Hardness(3.0, on))(*sides), reference(*sides, weigh=weigh), sides)


def test_progressive_weights_have_mean_one_and_follow_the_step():
    """Our reconstruction of PEG: w_ij = exp(alpha s_ij) / mean_j exp(alpha s_ij), alpha rising with the step."""
    queries, positives, negatives = sides = batch(1)

    def weigh_at(alpha):
        def weigh(row, column, s):
            others = [positives[j] for j in range(ROWS) if j != row] + [negatives[j, 0] for j in range(ROWS)]
            mean = sum(torch.exp(alpha * cosine(queries[row], other).detach()) for other in others) / len(others)
            return alpha * s - mean.log()

        return weigh

    loss = InfoNCE(TEMPERATURE, hardness=Hardness(Ramp(5.0, 100), mean_one=True))
    for step, alpha in ((0, 0.0), (40, 2.0), (100, 5.0), (1_000, 5.0)):
        assert_same(loss(*sides, Notes(step=step)), reference(*sides, weigh=weigh_at(alpha)), sides)
    with pytest.raises(ValueError, match=r"Notes\.step"):
        loss(*sides)


def test_both_directions_are_averaged():
    queries, positives, _ = batch()
    none = queries.new_zeros(ROWS, 0, DIM)
    wanted = (reference(queries, positives, none) + reference(positives, queries, none)) / 2
    assert_same(InfoNCE(TEMPERATURE, directions=("query-document", "document-query"))(queries, positives), wanted, (queries, positives))


def test_one_denominator_of_all_four_directions():
    queries, positives, negatives = sides = batch()
    documents = [positives[j] for j in range(ROWS)] + [negatives[j, k] for j in range(ROWS) for k in range(2)]
    owners = [*range(ROWS), *(j for j in range(ROWS) for _ in range(2))]
    terms = []
    for i in range(ROWS):
        cells = [cosine(queries[i], document) for document in documents]
        cells += [cosine(queries[j], positives[i]) for j in range(ROWS)]
        cells += [cosine(queries[j], queries[i]) for j in range(ROWS) if j != i]
        cells += [cosine(document, positives[i]) for document, owner in zip(documents, owners, strict=True) if owner != i]
        terms.append((torch.stack(cells) / TEMPERATURE).logsumexp(0) - cosine(queries[i], positives[i]) / TEMPERATURE)
    directions = ("query-document", "document-query", "query-query", "document-document")
    assert_same(InfoNCE(TEMPERATURE, directions=directions, softmax="joint")(*sides), sum(terms) / ROWS, sides)


def test_the_temperature_learns_also_where_columns_are_dropped():
    """Writing -inf before the scale multiplies made its gradient NaN in another project (0 * inf)."""
    sides = batch()
    temperature = Temperature(TEMPERATURE).double()
    notes = Notes(in_batch_negatives=torch.tensor([False] * ROWS))
    loss = InfoNCE(temperature)(*sides, notes)
    (found,) = torch.autograd.grad(loss, temperature.a)

    def at(shift):
        return InfoNCE(torch.exp(-(temperature.a + shift)).item())(*sides, notes).item()

    assert abs(float(found) - (at(1e-5) - at(-1e-5)) / 2e-5) < 1e-8


def test_the_temperature_stays_above_its_lowest_and_can_come_back():
    temperature = Temperature(0.02)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)
    for direction in (-1.0, 1.0):
        for _ in range(5):
            optimizer.zero_grad()
            (direction * temperature()).mul(0.01).backward()
            optimizer.step()
            assert temperature().item() <= 100.001
    assert temperature().item() < 50


def test_any_number_of_rows_at_once_gives_the_same():
    sides = batch()
    rows, columns = sides[0], sides[1]

    def block(start, rows, shared):
        places = torch.arange(start, start + len(rows[0]))
        return ((rows[0] @ shared[0].T).tanh() * (places[:, None] + 1)).sum()

    for cells in (1, ROWS, 4 * ROWS, 1_000):
        wanted = block(0, (rows,), (columns,))
        found = sum_over_rows(block, ROWS, (rows,), (columns,), cells=cells)
        assert_same(found * 3, wanted * 3, (rows, columns))
        with torch.no_grad():
            assert abs(float(sum_over_rows(block, ROWS, (rows,), (columns,), cells=cells)) - wanted.item()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_compared_in_float32(dtype):
    queries, positives, negatives = (side.detach().to(dtype) for side in batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = InfoNCE(0.01)(queries, positives, negatives)
    assert found.dtype == torch.float32
    wanted = InfoNCE(0.01)(queries.double(), positives.double(), negatives.double())
    assert abs(float(found) - float(wanted)) < 1e-4 * float(wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, p, n: (q[:1], p[:1]), "always be 0"),
        (lambda q, p, n: (q, p[:3]), "positives"),
        (lambda q, p, n: (q, p, n[:, :, :3]), "negatives"),
        (lambda q, p, n: (q, p, n, Notes(has_negative=torch.ones(2, 2, dtype=torch.bool))), "one flag"),
        (lambda q, p, n: (q, p, None, Notes(in_batch_negatives=torch.tensor([True, False, True, True, False, True]))), r"rows \[1, 4\]"),
        (lambda q, p, n: (q, p, n, Notes(positive_keys=torch.arange(ROWS))), "negative_keys"),
        (lambda q, p, n: (q, p, n, Notes(answer_keys=torch.zeros(ROWS, 2, dtype=torch.int64))), "positive_keys"),
    ],
)
def test_what_cannot_teach_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE()(*change(*batch()))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="softmax='joint'"):
        InfoNCE(directions=("query-document", "query-query"))
    with pytest.raises(ValueError, match="query-document"):
        InfoNCE(directions=("document-query",))
    with pytest.raises(ValueError, match="above 0"):
        InfoNCE(0)


def test_the_lowest_temperature_stays_finite_in_float32():
    batch = sample()
    value = InfoNCE(0.01)(batch.queries.float(), batch.positives.float(), batch.negatives.float(), batch.notes)
    assert math.isfinite(float(value))


def test_a_second_backward_pass_is_refused():
    """Blocks give their gradients away; the second pass would find them scaled already."""
    sides = batch()
    loss = InfoNCE()(*sides)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes back once"):
        loss.backward()
