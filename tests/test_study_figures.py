"""Means, intervals and paired tests of a study, against scipy's and against counting by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ogdm_jax.study import figures

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_spread_and_paired_test_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    first, second = rng.normal(size=(2, n)) * 3 + [[1], [2]]
    found = figures.paired(first, second)
    wanted = stats.ttest_rel(second, first)
    np.testing.assert_allclose([found["t"], found["p_t"]], [wanted.statistic, wanted.pvalue])
    low, high = wanted.confidence_interval(0.95)
    np.testing.assert_allclose([found["low"], found["high"]], [low, high])
    exact = stats.permutation_test(
        (second - first,), np.mean, permutation_type="samples", n_resamples=1000
    )
    assert found["p_signs"] == pytest.approx(exact.pvalue)
    assert figures.spread(first)["std"] == pytest.approx(np.std(first, ddof=1))


def test_the_sign_test_counts_all_signs():
    x = np.array([0.3, -0.1, 0.7, 0.2])
    sums = [abs(np.dot(signs, x)) for signs in itertools.product((1, -1), repeat=4)]
    wanted = np.mean([s >= abs(x.sum()) - 1e-12 for s in sums])
    assert figures.paired(np.zeros(4), x)["p_signs"] == wanted
    assert figures.paired(np.zeros(5), np.ones(5))["p_signs"] == 2 / 32  # the least for five
    assert figures.paired(np.zeros(4), np.zeros(4))["p_signs"] == 1


def test_one_seed_has_no_spread_and_nan_stays():
    one = figures.paired([1.0], [2.0])
    assert one["mean"] == 1 and one["p_signs"] == 1
    assert all(math.isnan(one[name]) for name in ("std", "low", "high", "p_t"))
    lost = figures.paired([1.0, math.nan, 2.0], [2.0, 3.0, 2.5])
    assert all(math.isnan(lost[name]) for name in ("mean", "std", "t", "p_t", "p_signs"))


def reports(values, **more):
    """One report for each of {(arm, seed, ema): fd}."""
    keys = {"checkpoint": "newest", "solver": "euler", "steps": 3, "nfe": 3, "floor": 1.0}
    return [
        keys | {"arm": arm, "seed": seed, "ema": ema, "fd": fd} | more
        for (arm, seed, ema), fd in values.items()
    ]


def test_only_seeds_that_all_have_are_compared():
    values = {("a", 0, "plain"): 1.0, ("a", 1, "plain"): 2.0, ("b", 1, "plain"): 5.0}
    (entry,) = figures.summary(reports(values), ["a", "b"], "fd")
    assert entry["seeds"] == [1] and entry["differences"]["b"]["values"] == [3.0]
    assert entry["floor"] == 1.0


def test_the_chosen_length_is_that_of_the_other_seeds():
    """Every seed is best at its own length: whoever chose on it would win, and must not."""
    rows = {"x": [1.0, 9.0, 5.0], "y": [9.0, 1.0, 5.0], "z": [6.0, 6.0, 4.0]}
    values = {
        (arm, k, ema): v for arm in "ab" for ema, row in rows.items() for k, v in enumerate(row)
    }
    *single, chosen = figures.summary(reports(values), ["a", "b"], "fd")
    assert [entry["ema"] for entry in single] == ["x", "y", "z"] and chosen["ema"] == "chosen"
    # Without seed 0: means 7, 3, 5, so y, whose seed 0 is 9; and so on.
    assert chosen["lengths"]["a"] == ["y", "x", "x"]
    assert chosen["arms"]["a"]["values"] == [9.0, 9.0, 5.0]
    assert chosen["differences"]["b"]["mean"] == 0


def test_the_table_has_a_row_for_each_way():
    values = {(arm, k, "plain"): 3.0 + k + 2 * (arm == "b") for arm in "ab" for k in range(5)}
    text = figures.markdown(figures.summary(reports(values), ["a", "b"], "fd"))
    head, _, row = text.strip().split("\n")
    assert "b - a [95 %]" in head and "5 ± 1.6" in row and "7 ± 1.6" in row
    assert "2 [2, 2]" in row and "0.062" in row
    alone = {key: value for key, value in values.items() if key[1] == 0}
    text = figures.markdown(figures.summary(reports(alone), ["a", "b"], "fd"))
    assert "| 3 | 5 | 2 |  |  |" in text and "nan" not in text
