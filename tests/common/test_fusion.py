"""The fusion step against a generic solver and closed forms, over norms, penalties, graphs and groups."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from common.numerics.fusion import Fusion, fuse_tensors
from common.numerics.graphs import complete_graph, graph_of, incidence

GRAPHS = {
    "path": graph_of(4, [(0, 1), (1, 2), (2, 3)]),
    "complete": complete_graph(4),
    "two parts": graph_of(5, [(0, 1), (2, 3), (3, 4)]),
}


def problem(graph, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Z_t, G = (torch.randn(graph.nodes, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return Z_t, G


def generic(graph, Z_t, G, *, eta, lam, p):
    """The dual with L-BFGS-B (p = 1: a box) or SLSQP (balls): min η/2 ‖QΩ‖² - <QΩ, A>, then Z = A - ηQΩ."""
    Q, N = incidence(graph).numpy(), graph.nodes
    A = Z_t.numpy() - eta / N * G.numpy()
    E, d = Q.shape[1], A.shape[1]

    def value(x):
        QO = Q @ x.reshape(E, d)
        return eta / 2 * (QO**2).sum() - (QO * A).sum(), (Q.T @ (eta * QO - A)).ravel()

    options = {"ftol": 1e-15, "maxiter": 5000}
    if p == 1:
        solved = minimize(value, np.zeros(E * d), jac=True, bounds=[(-lam, lam)] * (E * d), method="L-BFGS-B",
                          options=options | {"gtol": 1e-12})  # fmt: skip
        return A - eta * Q @ solved.x.reshape(E, d)
    if p == 2:
        ball = [{"type": "ineq", "fun": lambda x: lam**2 - (x.reshape(E, d) ** 2).sum(1)}]
    else:
        signs = np.array([1 - 2 * np.array(s) for s in np.ndindex(*([2] * d))])
        ball = [{"type": "ineq", "fun": lambda x: (lam - x.reshape(E, d) @ signs.T).ravel()}]
    start = np.full(E * d, 1e-3)
    solved = minimize(value, start, jac=True, constraints=ball, method="SLSQP", options=options)
    return A - eta * Q @ solved.x.reshape(E, d)


@pytest.mark.parametrize("p", [1, 2, "inf"])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_what_a_generic_solver_finds(name, p):
    graph = GRAPHS[name]
    Z_t, G = problem(graph)
    for lam in (0.1, 0.6):
        fusion = Fusion(graph, eta=0.7, p=p, tolerance=1e-11)
        got = fusion.step(Z_t, G, lam)
        oracle = torch.from_numpy(generic(graph, Z_t, G, eta=0.7, lam=lam, p=p))
        assert got.converged
        assert (got.Z - oracle).abs().max() < 5e-4
        assert fusion.objective(got.Z, Z_t, G, lam) <= fusion.objective(oracle, Z_t, G, lam) + 1e-10
        assert got.gap < 1e-10


def test_the_objective_is_the_papers_with_loops():
    graph = GRAPHS["path"]
    Z_t, G = problem(graph)
    Z = problem(graph, seed=1)[0]
    for p, norm in ((1, lambda v: v.abs().sum()), (2, lambda v: v.norm()), ("inf", lambda v: v.abs().max())):
        slow = sum(
            float(G[n] @ Z[n]) / 4 + float((Z[n] - Z_t[n]).square().sum()) / (2 * 0.3) for n in range(4)
        )
        slow += 1.7 * sum(float(norm(Z[i] - Z[j])) for i, j in graph.edges)
        assert Fusion(graph, eta=0.3, p=p).objective(Z, Z_t, G, 1.7) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, "inf"])
@pytest.mark.parametrize("rho", [None, 0.05, 1.0, 30.0])
def test_the_penalty_changes_the_path_only(p, rho):
    graph = GRAPHS["complete"]
    Z_t, G = problem(graph, d=6)
    reference = Fusion(graph, eta=0.5, p=p).step(Z_t, G, 0.3)
    got = Fusion(graph, eta=0.5, p=p, rho=rho).step(Z_t, G, 0.3)
    assert got.converged
    assert (got.Z - reference.Z).abs().max() < 1e-6


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_no_weight_steps_each_site_alone_exactly(p):
    graph = GRAPHS["complete"]
    Z_t, G = problem(graph)
    got = Fusion(graph, eta=0.3, p=p).step(Z_t, G, 0.0)
    assert (got.iterations, got.gap) == (0, 0.0)
    assert torch.equal(got.Z, Z_t - (0.3 / 4) * G)


@pytest.mark.parametrize("p", [1, 2, "inf"])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_large_weight_leads_each_component_to_its_mean(name, p, scale):
    graph = GRAPHS[name]
    Z_t, G = (scale * part for part in problem(graph, d=8))
    for eta in (1e-2, 10.0):
        A = Z_t - eta / graph.nodes * G
        got = Fusion(graph, eta=eta, p=p).step(Z_t, G, 1e6 * scale)
        assert got.converged
        parts = [[0, 1], [2, 3, 4]] if name == "two parts" else [list(range(graph.nodes))]
        for part in parts:
            assert (got.Z[part] - A[part].mean(dim=0)).abs().max() < 1e-6 * scale * max(1.0, eta)


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_two_sites_have_a_closed_form(p):
    """The difference shrinks by the proximal operator at 2ηλ, the mean stays."""
    graph = graph_of(2, [(1, 0)])
    a, b = (
        torch.tensor([3.0, -1.0, 0.2], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 0.1], dtype=torch.float64),
    )
    t = 2 * 0.5 * 0.6
    v = (a - b).numpy()
    if p == 1:
        shrunk = np.sign(v) * np.maximum(np.abs(v) - t, 0)
    elif p == 2:
        shrunk = max(0, 1 - t / np.linalg.norm(v)) * v
    else:
        shrunk = np.clip(v, -2.4, 2.4)  # (3 - θ) + 0 + 0 = 0.6
    Z = Fusion(graph, eta=0.5, p=p).step(torch.stack((a, b)), torch.zeros(2, 3), 0.6).Z
    assert np.allclose((Z[0] - Z[1]).numpy(), shrunk, atol=1e-7)
    assert torch.allclose(Z.mean(dim=0), (a + b) / 2, atol=1e-14)


def test_more_weight_brings_sites_closer_and_the_mean_stays():
    graph = GRAPHS["complete"]
    Z_t, G = problem(graph, d=10)
    fusion = Fusion(graph, eta=1.0)
    spreads = []
    for lam in (0.0, 0.05, 0.2, 0.5, 2.0):
        Z = fusion.step(Z_t, G, lam).Z
        spreads.append(float((Z - Z.mean(dim=0)).norm()))
        assert torch.allclose(Z.mean(dim=0), (Z_t - G / 4).mean(dim=0), atol=1e-13)
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 1e-6


def test_the_gap_bounds_the_distance_to_the_minimiser():
    graph = GRAPHS["path"]
    Z_t, G = problem(graph, d=20)
    exact = Fusion(graph, eta=0.5, tolerance=1e-12).step(Z_t, G, 0.4)
    for iterations in (1, 3, 10):
        rough = Fusion(graph, eta=0.5, rho=0.3, max_iterations=iterations).step(Z_t, G, 0.4)
        assert (rough.iterations, rough.converged) == (iterations, False)
        distance = float((rough.Z - exact.Z).norm())
        assert 1e-8 < distance <= (2 * 0.5 * rough.gap) ** 0.5 + 1e-9


def test_sites_that_agree_or_stand_alone_need_no_iteration():
    same = torch.ones(4, 3)
    assert Fusion(GRAPHS["complete"], eta=0.1).step(same, torch.zeros(4, 3), 5.0).iterations == 0
    for nodes in (1, 3):
        Z_t, G = problem(graph_of(nodes, []))
        got = Fusion(graph_of(nodes, []), eta=0.1).step(Z_t, G, 5.0)
        assert torch.equal(got.Z, Z_t - 0.1 / nodes * G)


def test_a_relabelling_of_sites_relabels_the_result():
    graph, order = GRAPHS["path"], [2, 0, 3, 1]
    Z_t, G = problem(graph)
    there = graph_of(4, [(order.index(i), order.index(j)) for i, j in graph.edges])
    got = Fusion(there, eta=0.4).step(Z_t[order], G[order], 0.5).Z
    assert torch.allclose(got, Fusion(graph, eta=0.4).step(Z_t, G, 0.5).Z[order], atol=1e-7)


# ---- named tensors and groups ----------------------------------------------------------------------------------------


def parts(graph, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 2), "b": (4,), "s": (), "none": (0, 2)}
    return {name: torch.randn(graph.nodes, *shape, generator=generator) for name, shape in shapes.items()}


def test_groups_share_a_norm_and_do_not_interact():
    graph = GRAPHS["path"]
    Z_t, G, fusion = parts(graph, 0), parts(graph, 1), Fusion(GRAPHS["path"], eta=0.8)
    together, ends = fuse_tensors(fusion, Z_t, G, 0.3)
    rows = [
        torch.cat([p[n].reshape(4, -1) if p[n].numel() else p[n].reshape(4, 0) for n in p], 1)
        for p in (Z_t, G)
    ]
    whole = fusion.step(rows[0], rows[1], 0.3)
    assert list(ends) == [None]
    assert torch.equal(ends[None].Z, whole.Z)
    assert torch.equal(together["w"], whole.Z[:, :6].reshape(4, 3, 2).float())
    assert torch.equal(together["s"], whole.Z[:, 10].float())
    assert {n: (t.shape, t.dtype) for n, t in together.items()} == {
        n: (t.shape, t.dtype) for n, t in Z_t.items()
    }

    split, ends = fuse_tensors(fusion, Z_t, G, 0.3, groups={"w": "x", "b": "y", "s": "x", "none": "z"})
    assert set(ends) == {"x", "y", "z"}
    alone, _ = fuse_tensors(fusion, {"b": Z_t["b"]}, {"b": G["b"]}, 0.3)
    assert torch.equal(split["b"], alone["b"])
    assert (split["b"] - together["b"]).abs().max() > 1e-3
    pair, _ = fuse_tensors(fusion, {n: Z_t[n] for n in "ws"}, {n: G[n] for n in "ws"}, 0.3)
    assert torch.equal(split["s"], pair["s"])


def test_with_the_first_norm_every_parameter_is_its_own_group():
    graph = GRAPHS["complete"]
    Z_t, G, fusion = parts(graph, 2), parts(graph, 3), Fusion(graph, eta=0.8, p=1)
    together, _ = fuse_tensors(fusion, Z_t, G, 0.2)
    split, _ = fuse_tensors(fusion, Z_t, G, 0.2, groups={name: name for name in Z_t})
    assert all(torch.allclose(together[name], split[name], atol=1e-6) for name in Z_t)


def test_what_does_not_fit_is_refused():
    graph, fusion = GRAPHS["path"], Fusion(GRAPHS["path"], eta=0.8)
    Z_t, G = problem(graph)
    for bad in (
        {"eta": 0.0},
        {"eta": float("inf")},
        {"eta": 1.0, "rho": 0.0},
        {"eta": 1.0, "tolerance": 0.0},
    ):
        with pytest.raises(ValueError, match="above 0"):
            Fusion(graph, **bad)
    with pytest.raises(ValueError, match="norm is 1, 2"):
        Fusion(graph, eta=1.0, p=3)
    with pytest.raises(ValueError, match="at least one iteration"):
        Fusion(graph, eta=1.0, max_iterations=0)
    with pytest.raises(ValueError, match="at least 0"):
        fusion.step(Z_t, G, -1.0)
    with pytest.raises(ValueError, match="4 sites"):
        fusion.step(Z_t[:3], G[:3], 1.0)
    with pytest.raises(ValueError, match="4 sites"):
        fusion.step(Z_t, G[:, :2], 1.0)
    with pytest.raises(ValueError, match="finite"):
        fusion.step(Z_t, G / 0, 1.0)
    with pytest.raises(ValueError, match="same names"):
        fuse_tensors(fusion, {"a": Z_t}, {"b": G}, 1.0)
    with pytest.raises(ValueError, match="same names"):
        fuse_tensors(fusion, {"a": Z_t}, {"a": G}, 1.0, groups={})
    with pytest.raises(ValueError, match="N = 4 sites"):
        fuse_tensors(fusion, {"a": Z_t[:2]}, {"a": G[:2]}, 1.0)
    with pytest.raises(ValueError, match="counters"):
        fuse_tensors(fusion, {"a": torch.ones(4, dtype=torch.int64)}, {"a": torch.ones(4)}, 1.0)
