"""How sure a number is: percentile bootstrap over questions.

Questions are drawn anew with replacement, the same draw for both arms of a quotient (they answered the same questions
in turns, so what makes a question slow or easy cancels), and the statistic is computed for each draw. What the
questions have in common (a loaded host, the model) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS, LEVEL = 1000, 0.95
Table = NDArray[np.float64]
# (sums over each draw's questions [repeats, draws], one a table) -> [draws]
Statistic = Callable[..., Table]


def interval(tables: Sequence[Table], statistic: Statistic, draws: int = DRAWS, seed: int = 0) -> list[float] | None:
    """The middle `LEVEL` of a statistic of sums over questions.

    Args:
        tables: `[repeats, questions]` each, the same questions in the same order.
        statistic: see `Statistic`.

    Returns:
        Lower and upper end; None for fewer than two questions, or where the statistic is not finite.
    """
    if not tables or tables[0].shape[0] == 0 or tables[0].shape[1] < 2:
        return None
    count = tables[0].shape[1]
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=draws).T.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(*(table @ weights for table in tables))
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: how likely so uneven a split is of answers that differ only by chance."""
    count, least = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count)


def rate(count: Table, total: Table) -> Table:
    """Median over repeats of a quotient of sums."""
    return np.asarray(np.median(count / total, axis=0))


def rate_ratio(count: Table, total: Table, base_count: Table, base_total: Table) -> Table:
    """Median over repeats of the quotient of two rates of the same repeat."""
    return np.asarray(np.median((count / total) / (base_count / base_total), axis=0))


def tabled(sums: Sequence[Mapping[Any, float]], questions: Sequence[object]) -> Table:
    """`[repeats, questions]` from one mapping a repeat."""
    return np.array([[own[question] for question in questions] for own in sums], dtype=float).reshape(
        len(sums), len(questions)
    )
