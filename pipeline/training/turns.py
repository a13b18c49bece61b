"""Whose turn it is: a sequence of data sets in which each has its share of every stretch, to within one turn."""

from collections.abc import Sequence

import numpy as np

from pipeline.config import ConfigError

PERIOD = 2**14
"""Turns after which the sequence repeats: shares are multiples of 1 / PERIOD. Independent of a run's length, so that a run can be made longer."""


def shares_of(weights: Sequence[float], temperature: float) -> np.ndarray:
    """(D,), sum 1: weight ** (1 / temperature), so 1 keeps the weights and a high temperature makes them equal (arXiv 1907.05019, section 4.2).

    Raises ConfigError for a weight that is not above 0.
    """
    given = np.asarray(weights, float)
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ConfigError(f"weights={[float(weight) for weight in given]} must be numbers above 0; leave out a data set that is not wanted")
    tempered = np.exp((np.log(given) - np.log(given).max()) / temperature)
    shares: np.ndarray = tempered / tempered.sum()
    return shares


def counts_of(shares: np.ndarray, period: int = PERIOD) -> np.ndarray:
    """Turns of each data set in a period, int64 (D,), sum `period`: largest remainders, and at least one turn for each."""
    if len(shares) > period:
        raise ConfigError(f"{len(shares)} data sets; at most {period} can take turns")
    free = period - len(shares)
    exact = np.maximum(shares * period - 1, 0)
    exact *= free / max(exact.sum(), 1e-300)
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: free - int(counts.sum())]] += 1
    counts += 1
    return counts


def turns_of(counts: np.ndarray) -> np.ndarray:
    """The data set of each turn, int32 (period,): after any t turns, data set d had t * counts[d] / period of them, to less than 1.

    R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): of those whose turn may come without being
    too early, the one that would first be too late. At equal times the first of the data sets.
    """
    num, period = len(counts), int(counts.sum())
    if num == 1:
        return np.zeros(period, np.int32)
    # In units of 1 / (2 num - 2), and so in whole numbers: rounding must not decide who is due.
    unit = 2 * num - 2
    had = np.zeros(num, np.int64)
    turns = np.empty(period, np.int32)
    due = (unit - 1) / counts
    for turn in range(1, period + 1):
        early = unit * (counts * turn - had * period) < period
        chosen = int(np.where(early, np.inf, due).argmin())
        turns[turn - 1] = chosen
        had[chosen] += 1
        due[chosen] = (unit * (had[chosen] + 1) - 1) / counts[chosen]
    return turns


def ordinals(turns: np.ndarray) -> np.ndarray:
    """Of each turn, how many its data set had before it in the period: int64 (period,)."""
    order = np.argsort(turns, kind="stable")
    first = np.searchsorted(turns[order], turns[order], side="left")
    found = np.empty(len(turns), np.int64)
    found[order] = np.arange(len(turns)) - first
    return found
