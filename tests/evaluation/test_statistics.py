"""Intervals against published examples, hand calculation and simulation."""

import numpy as np
import pytest

from sg_lightning.evaluation.statistics import independent_difference, paired_difference, share_of, wilson


def test_shares_carry_their_wilson_interval():
    # The example of Newcombe, Statistics in Medicine 17, 1998, p. 857.
    assert share_of(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)


def test_independent_difference_equals_newcombes_published_example():
    # Newcombe 1998 (two independent proportions), example (a), method 10: 56/70 - 48/80, interval 0.0524 to 0.3339.
    found = independent_difference(share_of(48, 80), share_of(56, 70))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_paired_difference_by_hand():
    before = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 0], dtype=bool)
    after = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1, 0], dtype=bool)  # three gained, one lost
    # Half a sample in each cell: centre 2/12, variance (3 + 1 + 1 - 4/12) / 144.
    half = 1.959964 * (5 - 4 / 12) ** 0.5 / 12
    assert paired_difference(before, after) == pytest.approx((0.2, 2 / 12 - half, 2 / 12 + half))


@pytest.mark.parametrize(("gain", "loss"), [(0.2, 0.1), (0.3, 0.02), (0.05, 0.05)])
def test_paired_interval_covers_the_truth_about_95_percent_of_the_time(gain, loss):
    rng, samples, hits, runs = np.random.default_rng(0), 80, 0, 2000
    for draw in rng.random((runs, samples)):
        after = draw < gain  # gained, or
        before = (draw >= gain) & (draw < gain + loss)  # lost, else wrong both times
        found = paired_difference(before, after)
        hits += found.low <= gain - loss <= found.high
    assert 0.93 <= hits / runs <= 0.99


def test_paired_interval_of_equal_answers_is_not_empty():
    same = np.arange(50) % 2 == 0
    found = paired_difference(same, same)
    assert found.value == 0
    assert found.low < 0 < found.high


def test_wilson_stays_within_zero_and_one():
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_unequal_samples_cannot_be_paired():
    with pytest.raises(ValueError, match="equal shapes"):
        paired_difference(np.ones(3, dtype=bool), np.ones(4, dtype=bool))
