"""The data plan against what it promises, and against slow, obvious references."""

import time
from fractions import Fraction

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.pairs.keys import hash64
from pipeline.training.order import Clashes, Epochs, Source, spread
from pipeline.training.plan import Draw, Mixture, Plan
from pipeline.training.turns import PERIOD, counts_of, ordinals, shares_of, turns_of


def source(name, num, **given):
    keys = np.array([hash64(name, str(row)) for row in range(num)])
    return Source(name, keys, **given)


def clashing(name, num, num_keys, seed=0, **given):
    """Rows with one key each of `num_keys`, drawn."""
    keys = np.random.default_rng(seed).integers(0, num_keys, num)
    return source(name, num, clash_rows=np.arange(num), clash_keys=keys, **given)


def random_case(seed):
    rng = np.random.default_rng(seed)
    interleaved = bool(rng.integers(2))
    block = int(rng.integers(2, 9))
    size = block * int(rng.integers(1, 5)) if interleaved else block
    sources = []
    for number in range(int(rng.integers(1, 5))):
        num = int(rng.integers(block, 60))
        given = {"weight": float(rng.uniform(0.2, 5)) if rng.integers(2) else None}
        if rng.integers(2):
            given["costs"] = rng.integers(1, 500, num)
        if rng.integers(2):
            given |= {"clash_rows": np.arange(num), "clash_keys": rng.integers(0, num, num)}
        sources.append(source(f"d{number}", num, **given))
    mixture = Mixture(
        batch_size=size,
        batches="interleaved" if interleaved else "homogeneous",
        interleave=block,
        seed=seed,
        bucket_batches=int(rng.integers(1, 5)),
        temperature=float(rng.uniform(0.5, 3)),
    )
    return sources, mixture


def same(one: Draw, other: Draw) -> bool:
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in ("dataset", "row", "epoch"))


def streams(plan, num_steps):
    """By data set, the rows that were drawn and their epochs, in order."""
    draws = [plan.batch(step) for step in range(num_steps)]
    dataset, row, epoch = (np.concatenate([getattr(draw, part) for draw in draws]) for part in ("dataset", "row", "epoch"))
    return {name: (row[dataset == number], epoch[dataset == number]) for number, name in enumerate(plan.names)}


# ---- turns ----


def obvious_turns(counts, num):
    """Tijdeman's rule, word by word, in exact arithmetic."""
    period, size = int(sum(counts)), len(counts)
    shares = [Fraction(int(count), period) for count in counts]
    slack = Fraction(1, 2 * size - 2)
    had = [0] * size
    turns = []
    for turn in range(1, num + 1):
        may = [d for d in range(size) if shares[d] * turn - had[d] >= slack]
        chosen = min(may, key=lambda d: ((had[d] + 1 - slack) / shares[d], d))
        had[chosen] += 1
        turns.append(chosen)
    return turns


@pytest.mark.parametrize("seed", range(6))
def test_turns_are_those_of_the_exact_rule_and_shares_are_met_to_less_than_one_turn(seed):
    rng = np.random.default_rng(seed)
    counts = counts_of(shares_of(rng.uniform(0.01, 3, rng.integers(2, 9)), 1.0), period=400)
    turns = turns_of(counts)
    assert turns.tolist() == obvious_turns(counts, 400)
    had = np.cumsum(turns[:, None] == np.arange(len(counts)), axis=0)
    assert np.abs(had - np.arange(1, 401)[:, None] * counts / 400).max() < 1
    assert had[-1].tolist() == counts.tolist()
    before = [turns[:at].tolist().count(turn) for at, turn in enumerate(turns.tolist())]
    assert ordinals(turns).tolist() == before


def test_a_tiny_weight_still_gets_a_turn_and_a_temperature_makes_shares_equal():
    counts = counts_of(shares_of([1.0, 1e-9, 1e6], 1.0))
    assert counts.sum() == PERIOD and counts.min() == 1
    assert shares_of([1.0, 9.0], 2.0) == pytest.approx([0.25, 0.75])
    assert shares_of([1.0, 1e12], 1e9) == pytest.approx([0.5, 0.5], abs=1e-6)
    with pytest.raises(ConfigError, match="above 0"):
        shares_of([1.0, 0.0], 1.0)


# ---- batches ----


@pytest.mark.parametrize("seed", range(40))
def test_batches_are_what_walking_through_the_epochs_gives(seed):
    """The reference keeps a queue of rows for each data set, takes turns one after the other, and never jumps."""
    sources, mixture = random_case(seed)
    plan = Plan(sources, mixture)
    queues = {name: [] for name in plan.names}
    epochs = dict.fromkeys(plan.names, 0)
    turn = 0
    for step in range(12):
        wanted = []
        for _ in range(mixture.batch_size // mixture.block):
            number = int(plan._turns[turn % PERIOD])
            turn += 1
            one = plan.sources[number]
            while len(queues[one.name]) < mixture.block:
                order = Epochs(one, mixture.seed, mixture.block, mixture.bucket_batches, Clashes(one)).order(epochs[one.name])
                queues[one.name] += [(number, row, epochs[one.name]) for row in order.tolist()]
                epochs[one.name] += 1
            wanted += queues[one.name][: mixture.block]
            del queues[one.name][: mixture.block]
        draw = plan.batch(step)
        assert list(zip(draw.dataset.tolist(), draw.row.tolist(), draw.epoch.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("seed", range(40))
def test_no_row_is_skipped_or_repeated_within_an_epoch(seed):
    sources, mixture = random_case(seed)
    plan = Plan(sources, mixture)
    complete = 0
    for one in plan.sources:
        rows, epochs = streams(plan, 120)[one.name]
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(int(epochs[-1]) if len(epochs) else 0):
            assert sorted(rows[epochs == epoch].tolist()) == list(range(len(one)))
            complete += 1
        last = rows[epochs == epochs[-1]].tolist() if len(epochs) else []
        assert len(set(last)) == len(last)
    assert complete


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_the_shares_of_any_number_of_workers_make_the_same_batch(num_ranks):
    sources, mixture = random_case(3)
    plan = Plan(sources, mixture.model_copy(update={"batch_size": 8 * mixture.block, "batches": "interleaved", "interleave": mixture.block}))
    for step in range(5):
        batch = plan.batch(step)
        parts = [batch.part(rank, num_ranks) for rank in range(num_ranks)]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        rebuilt = np.empty(len(batch), np.int64)
        for rank, part in enumerate(parts):
            rebuilt[rank::num_ranks] = part.row
        assert rebuilt.tolist() == batch.row.tolist()
    with pytest.raises(ConfigError, match="each needs a row"):
        batch.part(0, len(batch) + 1)


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_resumes_at_any_step_goes_on_as_if_it_had_not_stopped(seed):
    sources, mixture = random_case(seed)
    whole = Plan(sources, mixture)
    batches = [whole.batch(step) for step in range(30)]
    for stopped in (0, 1, 13, 29):
        again = Plan(sources[::-1], mixture)
        step = again.resume(whole.position(stopped))
        assert step == stopped
        assert all(same(again.batch(later), batches[later]) for later in range(step, 30))


def test_resuming_far_in_costs_an_epochs_order_and_no_replay():
    plan = Plan([source("a", 20_000), source("b", 5_000)], Mixture(batch_size=64))
    started = time.perf_counter()
    draw = plan.batch(10**9)
    assert time.perf_counter() - started < 2
    assert draw.epoch.min() > 10**6
    assert plan.epochs_at(10**9)["a"] == pytest.approx(10**9 * 64 / 25_000, rel=1e-3)


def test_a_changed_data_set_or_setting_is_not_resumed():
    plan = Plan([source("a", 50), source("b", 50)], Mixture(batch_size=8))
    position = plan.position(7)
    with pytest.raises(ConfigError, match=r"step 7.*sources differ in b"):
        Plan([source("a", 50), source("b", 51)], Mixture(batch_size=8)).resume(position)
    with pytest.raises(ConfigError, match="settings differ in seed"):
        Plan([source("a", 50), source("b", 50)], Mixture(batch_size=8, seed=1)).resume(position)


def test_another_seed_or_epoch_is_another_order():
    one = streams(Plan([source("a", 200)], Mixture(batch_size=10)), 120)["a"][0]
    other = streams(Plan([source("a", 200)], Mixture(batch_size=10, seed=1)), 60)["a"][0]
    assert one.tolist() != other.tolist()
    orders = one.reshape(6, 200)
    assert len({tuple(order) for order in orders.tolist()}) == 6
    # Over many seeds, a row is anywhere in the first epoch: the mean place of a row of 200 is 99.5, its deviation over 300 seeds 3.3.
    places = [np.flatnonzero(streams(Plan([source("a", 200)], Mixture(batch_size=10, seed=seed)), 20)["a"][0] == 5)[0] for seed in range(300)]
    assert abs(np.mean(places) - 99.5) < 12 and np.std(places) == pytest.approx(57.7, rel=0.15)


def test_another_data_set_leaves_the_order_within_the_others():
    mixture = Mixture(batch_size=8, batches="interleaved", interleave=4)
    few = streams(Plan([source("a", 90), source("b", 40)], mixture), 200)
    more = streams(Plan([source("c", 70), source("b", 40), source("a", 90)], mixture), 200)
    for name in ("a", "b"):
        num = min(len(few[name][0]), len(more[name][0]))
        assert num > 100 and few[name][0][:num].tolist() == more[name][0][:num].tolist()


def test_the_order_depends_on_row_ids_and_not_on_where_rows_are_stored():
    one = source("a", 100, costs=np.arange(100) % 7)
    moved = np.random.default_rng(0).permutation(100)
    other = Source("a", one.row_keys[moved], costs=one.costs[moved])
    rows = streams(Plan([one], Mixture(batch_size=10)), 30)["a"][0]
    places = streams(Plan([other], Mixture(batch_size=10)), 30)["a"][0]
    assert one.row_keys[rows].tolist() == other.row_keys[places].tolist()


def test_homogeneous_batches_hold_one_data_set_and_interleaved_ones_hold_blocks():
    sources = [source("a", 100), source("b", 50), source("c", 64)]
    homogeneous = Plan(sources, Mixture(batch_size=16))
    assert all(len(set(homogeneous.batch(step).dataset.tolist())) == 1 for step in range(60))
    interleaved = Plan(sources, Mixture(batch_size=16, batches="interleaved", interleave=4))
    batches = [interleaved.batch(step).dataset.reshape(4, 4) for step in range(60)]
    assert all((batch == batch[:, :1]).all() for batch in batches)
    assert max(len(set(batch[:, 0].tolist())) for batch in batches) == 3


@pytest.mark.parametrize("mode", ["homogeneous", "interleaved"])
def test_weights_are_met_in_every_stretch(mode):
    weights = {"a": 5.0, "b": 1.0, "c": 2.5}
    plan = Plan([source(name, 100, weight=weight) for name, weight in weights.items()], Mixture(batch_size=8, batches=mode, interleave=2))
    drawn = np.concatenate([plan.batch(step).dataset for step in range(400)])[:: plan.mixture.block]
    for number, weight in enumerate(weights.values()):
        had = np.cumsum(drawn == number) - np.arange(1, len(drawn) + 1) * weight / 8.5
        # Less than a turn; a tenth for shares that are no multiple of 1 / PERIOD.
        assert np.abs(had).max() < 1.1
    assert plan.steps(2.0) == round(2 * 300 / 8)


def test_without_weights_all_rows_come_equally_often():
    plan = Plan([source("a", 900), source("b", 100)], Mixture(batch_size=10))
    epochs = plan.epochs_at(plan.steps(5))
    assert epochs["a"] == pytest.approx(5, abs=0.02) and epochs["b"] == pytest.approx(5, abs=0.2)


def padded_share(plan, num_steps):
    """Share of tokens that are padding if each batch is padded to its longest row."""
    total = used = 0
    for step in range(num_steps):
        draw = plan.batch(step)
        costs = plan.sources[0].costs[draw.row]
        total, used = total + costs.max() * len(costs), used + costs.sum()
    return 1 - used / total


def test_rows_of_like_length_meet_and_padding_goes_down():
    """Log-normal lengths, median 64 and sigma 1, batches of 32: 81 % padding as drawn, 32 % from windows of 16 batches, 13 % of 64."""
    costs = np.exp(np.random.default_rng(0).normal(np.log(64), 1.0, 8192)).astype(np.int64) + 1
    shares = {
        window: padded_share(Plan([source("a", 8192, costs=costs)], Mixture(batch_size=32, bucket_batches=window)), 256) for window in (1, 16, 64)
    }
    assert shares[1] > 0.8
    assert shares[16] < 0.33 and shares[64] < 0.13


def test_a_small_data_set_does_not_have_the_same_batches_every_epoch():
    """Sorted as a whole, a data set would fall into the same batches again and again."""
    blocks = streams(Plan([source("a", 320, costs=np.arange(320))], Mixture(batch_size=32)), 20)["a"][0].reshape(2, 10, 32)
    first, second = ({frozenset(block) for block in epoch.tolist()} for epoch in blocks)
    assert not first & second


# ---- rows that clash ----


def clashes_in(blocks, keys):
    return sum(len(block) - len(set(keys[block].tolist())) for block in blocks)


@pytest.mark.parametrize(("num", "num_keys", "block"), [(64, 30, 4), (400, 100, 10), (400, 40, 20), (1000, 990, 100)])
def test_rows_that_clash_do_not_meet_where_that_can_be_avoided(num, num_keys, block):
    one = clashing("a", num, num_keys, seed=num)
    plan = Plan([one], Mixture(batch_size=block))
    assert max(np.bincount(one.clash_keys)) <= num // block
    rows = streams(plan, 4 * num // block)["a"][0]
    drawn = np.argsort([hash64(str(row)) for row in range(num)]).reshape(-1, block)
    assert clashes_in(drawn, one.clash_keys) > 0
    assert clashes_in(rows.reshape(-1, block), one.clash_keys) == 0


def test_rows_do_not_clash_nor_meet_themselves_in_a_block_of_two_epochs():
    one = clashing("a", 103, 60)
    rows = streams(Plan([one], Mixture(batch_size=10)), 103)["a"][0].reshape(-1, 10)
    assert all(len(set(block)) == 10 for block in rows.tolist())
    assert clashes_in(rows, one.clash_keys) == 0


def test_rows_with_several_keys_clash_for_each_of_them():
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 150, (300, 2))
    one = source("a", 300, clash_rows=np.repeat(np.arange(300), 2), clash_keys=keys.ravel())
    blocks = streams(Plan([one], Mixture(batch_size=10)), 60)["a"][0].reshape(-1, 10)
    meetings = [(a, b) for block in blocks.tolist() for i, a in enumerate(block) for b in block[:i] if set(keys[a]) & set(keys[b])]
    assert meetings == []


def test_what_cannot_be_avoided_is_left_and_every_row_still_comes():
    one = clashing("a", 2000, 3)
    started = time.perf_counter()
    rows = streams(Plan([one], Mixture(batch_size=100)), 20)["a"][0]
    assert time.perf_counter() - started < 10
    assert sorted(rows.tolist()) == list(range(2000))


def test_swaps_go_to_rows_of_like_length():
    costs = np.exp(np.random.default_rng(0).normal(np.log(64), 1.0, 4096)).astype(np.int64) + 1
    free = padded_share(Plan([source("a", 4096, costs=costs)], Mixture(batch_size=32)), 128)
    held = padded_share(Plan([clashing("a", 4096, 2000, costs=costs)], Mixture(batch_size=32)), 128)
    assert held < free + 0.05


@pytest.mark.parametrize("seed", range(20))
def test_spreading_keeps_the_rows_and_never_makes_it_worse(seed):
    rng = np.random.default_rng(seed)
    num, size = int(rng.integers(1, 12)), int(rng.integers(1, 8))
    one = clashing("a", num * size, max(1, num * size // 3), seed)
    blocks = rng.permutation(num * size).reshape(num, size)
    before = clashes_in(blocks, one.clash_keys)
    spread(blocks, Clashes(one), seed)
    assert sorted(blocks.ravel().tolist()) == list(range(num * size))
    assert clashes_in(blocks, one.clash_keys) <= before


@pytest.mark.parametrize("seed", range(5))
def test_shared_keys_are_those_that_two_rows_have(seed):
    rng = np.random.default_rng(seed)
    rows, keys = rng.integers(0, 20, 40), rng.integers(-8, 8, 40) * 10**15
    found = Clashes(source("a", 20, clash_rows=rows, clash_keys=keys))
    of = {row: {key for other, key in zip(rows.tolist(), keys.tolist(), strict=True) if other == row} for row in range(20)}
    for one in range(20):
        for other in range(one):
            assert set(found.of(one)).isdisjoint(found.of(other)) == of[one].isdisjoint(of[other])
        assert len(found.of(one)) == len(set(found.of(one)))
    places, codes = found.within(np.array([3, 1, 3]))
    assert [codes[places == place].tolist() for place in range(3)] == [found.of(3), found.of(1), found.of(3)]


# ---- settings ----


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        Plan([source("a", 50)], Mixture(batch_size=10, batches="interleaved", interleave=4))
    with pytest.raises(ConfigError, match=r"'a' has 5 rows.*at most 5"):
        Plan([source("a", 5)], Mixture(batch_size=10))
    with pytest.raises(ConfigError, match="name of its own"):
        Plan([source("a", 50), source("a", 50)], Mixture(batch_size=10))
