"""FIPA's adaptive rules: the printed values, every clamp, every refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics.adaptive import adaptive_rank, adaptive_steps

LAM = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
BAD = [float("nan"), float("inf"), -1.0]


def test_rank_by_hand():
    # thresholds 1 / (k (1.4 + 2.5)) times 8: kept is what is above 2.05, 1.03, 0.26, 1.03, 0.68
    assert adaptive_rank(LAM, 1, 1.4, 2.5) == 2
    assert adaptive_rank(LAM, 2, 1.4, 2.5) == 3
    assert adaptive_rank(LAM, 8, 1.4, 2.5) == 5
    assert adaptive_rank(LAM, 8, 1.4, 2.5, C_e=4.0) == 3
    assert adaptive_rank(LAM.to(torch.float32), 3, 1.4, 2.5) == 4


def test_rank_clamps():
    assert adaptive_rank(LAM, 1, 0.0, 0.0) == 1  # the threshold is huge: `most` leaves the largest
    assert adaptive_rank(torch.tensor([1.0, 0.995, 0.98]), 1, 0.0, 0.0) == 2
    assert adaptive_rank(torch.tensor([1.0, 0.995, 0.98]), 1, 0.0, 0.0, most=0.5) == 3
    assert adaptive_rank(torch.zeros(4), 5, 1.0, 1.0) == 1
    assert adaptive_rank(LAM, 1, 0.0, 0.0, at_least=3) == 3
    assert adaptive_rank(LAM, 1, 0.0, 0.0, at_least=30) == 6
    assert adaptive_rank(LAM, 1, 1.0, 1.0, C_e=0.0) == 5  # zeros are never kept by the threshold
    assert adaptive_rank(LAM, 10**9, 1e300, 1e300) == 5


@pytest.mark.parametrize("bad", BAD)
def test_rank_refuses_numbers_out_of_range(bad):
    for own, total, C_e in ((bad, 1.0, 1.0), (1.0, bad, 1.0), (1.0, 1.0, bad)):
        with pytest.raises(ValueError, match="finite number of at least 0"):
            adaptive_rank(LAM, 1, own, total, C_e=C_e)
    with pytest.raises(ValueError, match="threshold"):
        adaptive_rank(LAM, 1, 1.0, 1.0, most=bad)
    with pytest.raises(ValueError, match="Eigenvalues"):
        adaptive_rank(torch.tensor([1.0, bad]), 1, 1.0, 1.0)


def test_rank_refuses_the_rest():
    with pytest.raises(ValueError, match="from 1"):
        adaptive_rank(LAM, 0, 1.0, 1.0)
    with pytest.raises(ValueError, match="smallest rank"):
        adaptive_rank(LAM, 1, 1.0, 1.0, at_least=0)
    with pytest.raises(ValueError, match="threshold"):
        adaptive_rank(LAM, 1, 1.0, 1.0, most=1.0)
    with pytest.raises(ValueError, match="descending"):
        adaptive_rank(LAM.flip(0), 1, 1.0, 1.0)
    for lam in (torch.zeros(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="vector"):
            adaptive_rank(lam, 1, 1.0, 1.0)


@given(st.integers(1, 1000), st.floats(1e-3, 1e6), st.floats(1e-6, 0.99))
@settings(max_examples=50, deadline=None)
def test_steps_are_the_fewest_that_reach_the_target(k, gradient, gain):
    """The oracle multiplies: after τ steps the slowest direction is at C_t / k, after τ - 1 it is not."""
    steps = adaptive_steps(k, gradient, gain * 100, 0.01, cap=10**9)
    left, target = math.log(gradient), math.log(0.1 / k)
    per_step = math.log(1 - gain)
    assert steps == 1 or left + (steps - 1) * per_step > target - 1e-6
    assert left + steps * per_step <= target + 1e-6
    assert adaptive_steps(k, gradient, gain * 100, 0.01, cap=20) == min(steps, 20)


def test_steps_by_hand():
    # the gradient 1 has to shrink to 0.1 / k by halves: 2^-4 < 1/10, 2^-7 < 1/100
    assert adaptive_steps(1, 1.0, 5.0, 0.1) == 4
    assert adaptive_steps(10, 1.0, 5.0, 0.1) == 7
    assert adaptive_steps(1, 1.0, 5.0, 0.1, C_t=0.01) == 7
    assert adaptive_steps(10, 1.0, 5.0, 0.1, cap=5) == 5


def test_steps_clamps():
    assert adaptive_steps(1, 0.0, 1.0, 0.1) == 1  # nothing to do
    assert adaptive_steps(1, 0.1, 1.0, 0.1) == 1  # the ratio is 1
    assert adaptive_steps(1, 0.01, 1.0, 0.1) == 1  # above 1: the published rule is negative here
    assert adaptive_steps(1, 0.01, 0.0, 0.1) == 1  # and that comes first
    assert adaptive_steps(1, 0.0, 1.0, 0.1, C_t=0.0) == 1
    assert adaptive_steps(1, 1.0, 0.0, 0.1, cap=77) == 77
    assert adaptive_steps(1, 1.0, 1.0, 0.0) == 200
    assert adaptive_steps(1, 1.0, 1e-200, 1e-200) == 200  # the product is 0 in float64
    # 1 - 1e-17 is 1 in float64, yet the rule has a value: log(0.1) / -1e-17
    assert adaptive_steps(1, 1.0, 1e-17, 1.0, cap=10**18) == pytest.approx(2.302585092994046e17, rel=1e-14)
    assert adaptive_steps(1, 1.0, 10.0, 0.1) == 1  # one step covers the direction
    assert adaptive_steps(1, 1.0, 1e300, 1e300) == 1
    assert adaptive_steps(1, 1.0, 1.0, 0.5, C_t=0.0) == 200
    assert (
        adaptive_steps(1, 1e308, 1.0, 0.5, C_t=5e-324, cap=10**6) == 2098
    )  # log2 of 2e631; the ratio underflows


@pytest.mark.parametrize("bad", BAD)
def test_steps_refuse(bad):
    for gradient, lam, lr, C_t in ((bad, 1, 1, 1), (1, bad, 1, 1), (1, 1, bad, 1), (1, 1, 1, bad)):
        with pytest.raises(ValueError, match="finite number of at least 0"):
            adaptive_steps(1, gradient, lam, lr, C_t=C_t)
    with pytest.raises(ValueError, match="from 1"):
        adaptive_steps(0, 1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="most steps"):
        adaptive_steps(1, 1.0, 1.0, 0.1, cap=0)
