"""CER: the exact solver against a generic one, ADMM and the optimality conditions; runs; whole updates."""

import ast
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from common.numerics import taut_string, total_variation
from common.numerics.total_variation import (
    cer_objective,
    cer_tensors,
    cer_update,
    cer_update_admm,
    from_runs,
    peak_of_sums,
    runs,
)

pytestmark = pytest.mark.slow  # compiles its kernels


def dense(d):
    """The paper's matrix: rows (1, -1), the last one (0 … 0, 1)."""
    return np.eye(d) - np.diag(np.ones(d - 1), 1)


def generic(g, gamma):
    """The dual as a bounded least squares problem, by an active set method on dense matrices."""
    solved = lsq_linear(dense(len(g)).T, g, (-gamma, gamma), method="bvls", tol=1e-15, max_iter=1000)
    return g - dense(len(g)).T @ solved.x


def assert_optimal(u, g, gamma, scale=2e-13):
    """The subgradient conditions: s = cumsum(g - u) is in [-γ, γ], and ±γ wherever the string has a knot."""
    slack = scale * np.abs(g).sum() + 1e-300
    s = np.cumsum((g - u).astype(np.longdouble))
    assert np.abs(s).max() <= gamma + slack
    step = dense_free(u)
    assert np.abs(s - gamma * np.sign(step))[step != 0].max(initial=0) <= slack


def dense_free(u):
    return u - np.append(u[1:], 0.0)


def walk(seed, d):
    return np.random.default_rng(seed).normal(size=d)


SHAPES = {
    "noise": walk(0, 6000),
    "ramp up": np.linspace(-1, 1, 6000),
    "ramp down": np.linspace(1, -1, 6000),
    "one sign": np.abs(walk(1, 6000)) + 0.5,
    "alternating": np.where(np.arange(6000) % 2, 1.0, -1.0),
    "waves": np.sin(np.arange(6000) / 300) + 0.01 * walk(2, 6000),
    "heavy tails": walk(3, 6000) ** 5,
    "one spike": np.eye(1, 6000, 3000)[0],
    "growing spikes": np.where(np.arange(6000) % 10, 0.0, np.arange(6000)),
    "constant": np.full(6000, 0.1),
}


# ---- the exact solver ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 17, 60])
@pytest.mark.parametrize("gamma", [1e-3, 0.2, 1.0, 3.0])
def test_it_is_what_a_generic_solver_finds(d, gamma):
    for seed in range(3):
        g = walk(seed, d) + 0.3
        u, oracle = cer_update(g, gamma), generic(g, gamma)
        assert np.abs(u - oracle).max() <= 1e-10
        assert cer_objective(u, g, gamma) <= cer_objective(oracle, g, gamma) + 1e-10


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    gamma=st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 4.0]),
)
def test_ties_are_solved_exactly(values, gamma):
    g = np.array(values, dtype=np.float64)
    u = cer_update(g, gamma)
    assert_optimal(u, g, gamma)
    assert cer_objective(u, g, gamma) <= cer_objective(generic(g, gamma), g, gamma) + 1e-10


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("share", [1e-12, 1e-4, 0.02, 0.3, 0.99])
def test_long_vectors_meet_the_optimality_conditions(name, share):
    g = SHAPES[name]
    gamma = share * peak_of_sums(g)
    u, chains = cer_update(g, gamma), g.copy()
    assert_optimal(u, g, gamma)
    taut_string._by_chains(chains, gamma, 0, 0.0)
    assert np.array_equal(u, chains)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_chains_longer_than_their_first_room_are_solved(sign):
    """A ramp inside the tube keeps every point of one chain: pieces are moved to larger arrays, several times.

    It is also what the first slopes alone cannot solve in linear time, so the chains take over within it.
    """
    ramp = sign * np.linspace(-1, 1, 20_000)
    g = np.concatenate((ramp, 30 * walk(4, 20_000), ramp))
    gamma = 2000.0
    u, chains = cer_update(g, gamma), g.copy()
    assert len(runs(u)[0]) > 2
    assert_optimal(u, g, gamma)
    taut_string._by_chains(chains, gamma, 0, 0.0)
    assert np.array_equal(u, chains)
    solved, side = taut_string._by_bounds(g.copy(), gamma)
    assert 0 < solved < g.size
    assert side in (-1.0, 1.0)


def test_it_is_zero_exactly_from_the_peak_of_the_sums_on():
    for g in (*SHAPES.values(), walk(5, 1), np.array([0.1, 0.2, -0.7, 0.1])):
        for values in (g, g.astype(np.float32)):
            peak = np.abs(np.cumsum(values, dtype=np.float64)).max()
            assert peak_of_sums(values) == peak
            assert not cer_update(values, peak).any()
            assert not cer_update(values, 2 * peak).any()
            assert cer_update(values.astype(np.float64), np.nextafter(peak, 0)).any()
            assert not cer_update(values, 1.0, relative=True).any()
            assert cer_update(values, 0.999, relative=True).any()


def test_a_large_weight_leads_to_zero_and_not_to_the_mean():
    g = np.full(50, 2.0)
    assert np.allclose(cer_update(g, 60.0), (100 - 60) / 50)
    assert not cer_update(g, 100.0).any()


def test_zero_weight_gives_the_update_back_to_the_bit():
    g = np.array([0.0, -0.0, 1e-320, 3.0, -7.1])
    for values in (g, g.astype(np.float32)):
        assert cer_update(values, 0.0).tobytes() == values.tobytes()
        assert cer_update(values, 0.0) is not values


def test_a_scale_by_a_power_of_two_changes_no_digit():
    g = walk(6, 3000)
    u = cer_update(g, 1.5)
    for factor in (2.0**-400, 2.0**400):
        assert np.array_equal(cer_update(g * factor, 1.5 * factor), u * factor)
    assert np.array_equal(cer_update(-g, 1.5), -u)


def test_float32_is_computed_in_float64_and_strides_do_not_matter():
    g = walk(7, 4000).astype(np.float32)
    kept = g.copy()
    u = cer_update(g, 2.0)
    assert u.dtype == np.float32
    assert np.array_equal(u, cer_update(g.astype(np.float64), 2.0).astype(np.float32))
    assert np.array_equal(cer_update(np.repeat(g, 2)[::2], 2.0), u)
    assert np.array_equal(g, kept)


def test_levels_keep_their_digits_beside_a_huge_beginning():
    """A global cumulative sum of 1e12 would leave the second half four digits fewer."""
    g = np.concatenate((np.full(1000, 1e9), -np.full(1000, 1e9), walk(8, 3000)))
    tail = cer_update(g, 0.5)[2100:4900]
    assert np.abs(tail - cer_update(g[2000:], 0.5)[100:2900]).max() <= 1e-12


def test_more_weight_makes_fewer_runs_on_average():
    weights = [0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    counts = [np.mean([len(runs(cer_update(walk(s, 2000), w))[0]) for s in range(8)]) for w in weights]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 2000
    assert counts[-1] < 30


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308])
def test_values_that_cannot_be_summed_are_refused(bad):
    g = np.ones(100)
    g[[3, 40]] = bad
    for gamma in (0.0, 1.0, 1e9):
        with pytest.raises(ValueError, match="finite"):
            cer_update(g, gamma)


@pytest.mark.parametrize("gamma", [-1.0, np.nan, np.inf])
def test_a_bad_weight_is_refused(gamma):
    for solve in (cer_update, cer_update_admm):
        with pytest.raises(ValueError, match="at least 0"):
            solve(np.ones(3), gamma)
    with pytest.raises(ValueError, match="at least 0"):
        cer_tensors({}, gamma)


@pytest.mark.parametrize("g", [np.ones((2, 2)), np.ones(3, dtype=np.int64), np.ones(3, dtype=np.float16)])
def test_other_shapes_and_dtypes_are_refused(g):
    for solve in (cer_update, cer_update_admm):
        with pytest.raises(ValueError, match="float32 or float64 values"):
            solve(g, 1.0)
    with pytest.raises(ValueError, match="float32 or float64 values"):
        runs(g)


def test_importing_the_module_does_not_import_the_compiler():
    tops = [
        node for node in ast.parse(inspect.getsource(total_variation)).body if "mport" in type(node).__name__
    ]
    text = " ".join(ast.unparse(node) for node in tops)
    assert "numba" not in text
    assert "taut_string" not in text


# ---- the paper's problem and its ADMM --------------------------------------------------------------------------------


def test_the_papers_problem_is_this_one_for_every_step_size_and_start():
    rng = np.random.default_rng(9)
    for eta in (1e-3, 0.5, 7.0):
        g, start, u = rng.normal(size=(3, 30))
        y = start - eta * u
        printed = g @ y + 0.8 * np.abs(dense(30) @ (y - start)).sum() + ((y - start) ** 2).sum() / (2 * eta)
        constant = g @ start - eta / 2 * g @ g
        assert np.isclose(printed, eta * cer_objective(u, g, 0.8) + constant, rtol=1e-12)


@pytest.mark.parametrize("rho", [0.2, 1.0, 4.0])
def test_admm_finds_the_same_with_every_penalty(rho):
    """With the printed threshold it would be right for rho = 1 only."""
    g = walk(10, 200) + np.repeat([1.0, -2.0, 0.5, 3.0], 50)
    exact = cer_update(g, 2.0)
    solved = cer_update_admm(g, 2.0, rho=rho, tolerance=1e-11, max_iterations=50_000)
    assert solved.converged
    assert np.abs(solved.u - exact).max() <= 1e-8
    assert cer_objective(exact, g, 2.0) <= cer_objective(solved.u, g, 2.0) + 1e-10


def test_admm_says_how_it_ended():
    g = walk(11, 300)
    short = cer_update_admm(g, 3.0, max_iterations=3)
    assert (short.iterations, short.converged) == (3, False)
    solved = cer_update_admm(g, 3.0, tolerance=1e-5)
    assert solved.converged
    assert 3 < solved.iterations < 10_000
    assert solved.primal <= 1e-5 * np.linalg.norm(dense(300) @ g)
    assert solved.dual <= 1e-5 * np.linalg.norm(g)
    assert cer_update_admm(np.zeros(4), 1.0).iterations == 0
    assert np.array_equal(cer_update_admm(g, 0.0).u, g)
    assert np.isclose(cer_update_admm(np.array([3.0]), 1.0, tolerance=1e-12).u[0], 2.0)


@pytest.mark.parametrize("bad", [{"rho": 0.0}, {"rho": np.inf}, {"tolerance": 0.0}, {"max_iterations": 0}])
def test_admm_refuses_bad_parameters(bad):
    with pytest.raises(ValueError, match="ADMM needs"):
        cer_update_admm(np.ones(3), 1.0, **bad)
    with pytest.raises(ValueError, match="finite"):
        cer_update_admm(np.array([1.0, np.nan]), 1.0)


# ---- runs ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-40, 2.0**-1074]), max_size=30),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_runs_and_back_is_exact(values, dtype):
    u = np.array(values, dtype=dtype)
    starts, levels = runs(u)
    assert starts.dtype == np.int64
    assert levels.dtype == dtype
    assert from_runs(starts, levels, len(u)).tobytes() == u.tobytes()
    slow = [i for i in range(len(u)) if i == 0 or u[i].tobytes() != u[i - 1].tobytes()]
    assert starts.tolist() == slow


def test_the_runs_of_an_update_are_few():
    u = cer_update(walk(12, 50_000), 50.0)
    starts, levels = runs(u)
    assert len(starts) < 500
    assert np.array_equal(from_runs(starts, levels, len(u)), u)
    assert (levels[1:] != levels[:-1]).all()


@pytest.mark.parametrize(
    ("starts", "levels", "size"),
    [
        ([1], [2.0], 3),
        ([0, 2, 2], [1.0, 2.0, 3.0], 4),
        ([0, 5], [1.0, 2.0], 5),
        ([], [], 2),
        ([0], [1.0], 0),
        ([0, 1], [1.0], 3),
        ([], [], -1),
    ],
)
def test_runs_that_describe_nothing_are_refused(starts, levels, size):
    with pytest.raises(ValueError, match=r"of runs|are int64"):
        from_runs(np.array(starts, dtype=np.int64), np.array(levels), size)


def test_runs_of_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        runs(np.array([1.0, np.nan]))


# ---- whole updates ---------------------------------------------------------------------------------------------------


def update():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(8, 4, 3, generator=generator),
        "b": torch.randn(64, generator=generator, dtype=torch.float64).to(torch.bfloat16),
        "c": torch.randn(5, 5, generator=generator, dtype=torch.float64).T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("relative", [False, True])
def test_each_tensor_is_solved_on_its_own(relative):
    tensors = update()
    got = cer_tensors(tensors, 0.3, relative=relative)
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        flat = tensor.to(torch.float64).flatten().numpy()
        gamma = 0.3 * np.abs(np.cumsum(flat)).max(initial=0) if relative else 0.3
        slow = generic(flat, gamma) if flat.size else flat
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        close = 1e-2 if tensor.dtype == torch.bfloat16 else 1e-6
        assert np.allclose(got[name].to(torch.float64).flatten().numpy(), slow, rtol=close, atol=close)


def test_admm_is_an_option_and_near_the_exact_one():
    tensors = {"a": update()["a"]}
    exact, near = (cer_tensors(tensors, 0.1, relative=True, solver=s)["a"] for s in ("exact", "admm"))
    assert (exact - near).abs().max() < 1e-3
    assert not torch.equal(exact, near)


def test_zero_weight_copies_the_tensors_to_the_bit():
    tensors = update()
    for relative in (False, True):
        got = cer_tensors(tensors, 0.0, relative=relative)
        assert all(torch.equal(got[name], tensors[name]) for name in tensors)
        assert got["a"].data_ptr() != tensors["a"].data_ptr()


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        cer_tensors({"steps": torch.tensor([3])}, 1.0)
    with pytest.raises(ValueError, match="finite"):
        cer_tensors({"w": torch.tensor([1.0, float("nan")])}, 0.0)
    with pytest.raises(ValueError, match="exact"):
        cer_tensors({}, 1.0, solver="other")
    with pytest.raises(ValueError, match="did not converge"):
        cer_tensors({"w": torch.from_numpy(np.sin(np.arange(1000) / 100))}, 0.5, relative=True, solver="admm")
