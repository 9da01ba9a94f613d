"""Proximal operators against numerical minimisation, the printed formula, and their own identities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from common.numerics.proximal import project_l1_ball, prox_norm, soft_threshold

ORDERS = {1: 1, 2: 2, "inf": np.inf}


def numerical(a, t, p):
    """Minimise t s + ½‖w - a‖² under ‖w‖_p ≤ s with SLSQP: smooth, its constraints are those of the epigraph."""
    d = len(a)
    if p == 2:
        bounds = [
            {"type": "ineq", "fun": lambda x: x[-1] ** 2 - x[:d] @ x[:d]},
            {"type": "ineq", "fun": lambda x: x[-1]},
        ]
    else:
        # p = 1: a bound for each entry, s is their sum; p = inf: one bound for all
        signs = [np.array(s) for s in np.ndindex(*([2] * d))] if p == 1 else None
        rows = (
            [np.append(1 - 2.0 * s, -1.0) for s in signs]
            if p == 1
            else [np.append(sign * row, -1.0) for row in np.eye(d) for sign in (1.0, -1.0)]
        )
        R = np.array(rows)
        bounds = [{"type": "ineq", "fun": lambda x: -R @ x}]
    start = np.append(a, np.linalg.norm(a, ORDERS[p]) + 0.1)
    solved = minimize(
        lambda x: t * x[-1] + 0.5 * np.sum((x[:d] - a) ** 2),
        start,
        jac=lambda x: np.append(x[:d] - a, t),
        constraints=bounds,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return solved.x[:d]


def objective(w, a, t, p):
    return t * np.linalg.norm(w, ORDERS[p]) + 0.5 * np.sum((w - a) ** 2)


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_each_is_the_minimiser(p):
    rng = np.random.default_rng(0)
    for t in (0.1, 0.8, 2.5):
        a = rng.normal(size=4) * 2
        got = prox_norm(torch.from_numpy(a), t, p).numpy()
        oracle = numerical(a, t, p)
        assert np.abs(got - oracle).max() < 2e-4
        assert objective(got, a, t, p) <= objective(oracle, a, t, p) + 1e-9
        for _ in range(50):
            assert objective(got, a, t, p) <= objective(got + 0.01 * rng.normal(size=4), a, t, p)


def test_the_worked_example_is_not_the_printed_formula():
    a = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    assert prox_norm(a, 1.0, 1).tolist() == [2.0, 0.0, 0.0]
    assert prox_norm(a, 1.0, "inf").tolist() == pytest.approx([2.0, 1.0, 0.2], abs=1e-15)
    # [1 - t / ‖a‖_q]₊ a, as printed for every p
    assert ((1 - 1 / 3) * a).tolist() == pytest.approx([2.0, 0.667, 0.133], abs=1e-3)
    assert torch.allclose(prox_norm(a, 1.0, 2), (1 - 1 / a.norm()) * a, rtol=1e-14)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-5, 5), min_size=1, max_size=12),
    t=st.floats(0.01, 8),
    p=st.sampled_from([1, 2, "inf"]),
)
def test_what_is_taken_off_lies_in_the_dual_ball_and_is_aligned(values, t, p):
    """Optimality: a - w = t v with ‖v‖_q ≤ 1 and <v, w> = ‖w‖_p."""
    a = torch.tensor(values, dtype=torch.float64)
    w = prox_norm(a, t, p)
    v = ((a - w) / t).numpy()
    assert np.linalg.norm(v, {1: np.inf, 2: 2, "inf": 1}[p]) <= 1 + 1e-10
    assert v @ w.numpy() == pytest.approx(np.linalg.norm(w.numpy(), ORDERS[p]), abs=1e-10)


@pytest.mark.parametrize("p", [1, 2, "inf"])
@pytest.mark.parametrize("dim", [0, 1])
def test_many_vectors_at_once_are_the_single_ones(p, dim):
    A = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A[:, 2], A[3] = 0.0, 0.0
    got = prox_norm(A, 0.7, p, dim=dim)
    for one, row in zip(A.unbind(1 - dim), got.unbind(1 - dim), strict=True):
        assert torch.allclose(prox_norm(one, 0.7, p), row, rtol=1e-14, atol=1e-15)
    assert torch.equal(prox_norm(A, 0.0, p, dim=dim), A)
    assert prox_norm(A[:, :0], 0.7, p, dim=dim).shape == A[:, :0].shape


@pytest.mark.parametrize(("p", "q"), [(1, float("inf")), (2, 2), ("inf", 1)])
def test_it_is_zero_exactly_where_the_dual_norm_is_within_the_threshold(p, q):
    a = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    t = float(torch.linalg.vector_norm(a, q))
    assert not prox_norm(a, t, p).any()
    assert prox_norm(a, t * (1 - 1e-12), p).any()


def slow_projection(a, radius):
    """Bisection on the level."""
    low, high = 0.0, np.abs(a).max()
    if np.abs(a).sum() <= radius:
        return a
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(a) - middle, 0).sum() > radius else (low, middle)
    return np.sign(a) * np.maximum(np.abs(a) - high, 0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.3, 1.0, 4.0]), min_size=1, max_size=10),
    radius=st.floats(0, 9),
)
def test_the_projection_is_the_one_of_bisection_and_moreaus_other_half(values, radius):
    a = torch.tensor(values, dtype=torch.float64)
    P = project_l1_ball(a, radius)
    assert np.allclose(P.numpy(), slow_projection(a.numpy(), radius), atol=1e-12)
    assert torch.allclose(prox_norm(a, radius, "inf") + P, a, atol=1e-12)
    if a.abs().sum() < radius:
        assert torch.equal(P, a)


def test_float32_keeps_its_dtype_and_a_long_vector_its_radius():
    a = torch.rand(300_000, generator=torch.Generator().manual_seed(2))
    P = project_l1_ball(a, 1000.0)
    assert P.dtype == torch.float32
    assert float(P.double().sum()) == pytest.approx(1000.0, rel=1e-4)


@pytest.mark.parametrize("t", [-1.0, float("nan"), float("inf")])
def test_bad_arguments_are_refused(t):
    a = torch.ones(3)
    for p in (1, 2, "inf"):
        with pytest.raises(ValueError, match="at least 0"):
            prox_norm(a, t, p)
    with pytest.raises(ValueError, match="at least 0"):
        project_l1_ball(a, t)
    with pytest.raises(ValueError, match="float32 or float64"):
        soft_threshold(torch.ones(3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="norm is 1, 2"):
        prox_norm(a, 1.0, 3)
