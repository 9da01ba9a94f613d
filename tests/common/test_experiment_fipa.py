"""The paper's function and PDE experiments: hand-written derivatives, right-hand sides and rounds, against oracles."""

import json

import pytest
import torch
from torch import nn

from common.numerics.rng import generator
from experiments.fipa.fitting import BUMPS, SPLITS_1D, gaussian_mixture, one_dimensional, two_dimensional
from experiments.fipa.mlp import TanhNetwork, local_adam
from experiments.fipa.residuals import EQUATIONS, poisson, two_strips
from experiments.fipa.rounds import Settings, merge, run, sketch

EVERY_EQUATION = [*EQUATIONS, "poisson-product-3", "poisson-sum-2"]


def equation(name):
    if name in EQUATIONS:
        return EQUATIONS[name]
    _, target, d = name.split("-")
    return poisson(int(d), target)


def by_autograd(network, theta, x):
    """u, du/dx and lap u at one client's points, from a plain network and autograd alone."""
    layers, at = [], 0
    for n_in, n_out in network.shapes:
        weight = theta[at : at + n_in * n_out].reshape(n_in, n_out)
        at += n_in * n_out
        layers.append((weight, theta[at : at + n_out]))
        at += n_out

    def u(points):
        h = points
        for place, (weight, bias) in enumerate(layers):
            h = h @ weight + bias
            if place < len(layers) - 1:
                h = torch.tanh(h)
        return h[:, 0]

    value, slopes, laplacian = derivatives(u, x)
    return torch.cat([value.unsqueeze(0), slopes.T, laplacian.unsqueeze(0)])


def derivatives(u, x):
    """u, its gradient and its Laplacian at every row of x, by autograd."""
    x = x.clone().requires_grad_()
    value = u(x)
    slopes = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    laplacian = torch.zeros_like(value)
    for k in range(x.shape[1]):
        laplacian = laplacian + torch.autograd.grad(slopes[:, k].sum(), x, create_graph=True)[0][:, k]
    return value, slopes, laplacian


@pytest.fixture
def small():
    network = TanhNetwork((3, 5, 4, 1))
    source = generator("test")
    theta = torch.stack([network.initial(source) for _ in range(2)]) + 0.1
    return network, theta, torch.rand(2, 6, 3, generator=source, dtype=torch.float64)


def test_value_gradient_and_laplacian_are_autograds(small):
    network, theta, x = small
    channels = network.forward(theta, x, laplacian=True).output
    for m in range(2):
        torch.testing.assert_close(channels[m], by_autograd(network, theta[m], x[m]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(network.forward(theta, x).output[:, 0], channels[:, 0])


@pytest.mark.parametrize("laplacian", [False, True])
def test_jacobian_rows_and_gradient_are_autograds(small, laplacian):
    network, theta, x = small
    tape = network.forward(theta, x, laplacian=laplacian)
    seeds = torch.randn(tape.output.shape, generator=generator("seeds"), dtype=torch.float64)
    rows = network.jacobian(theta, tape, seeds)
    for m in range(2):

        def weighted(one, m=m):
            channels = by_autograd(network, one, x[m])
            return (seeds[m] * (channels if laplacian else channels[:1])).sum(0)

        expected = torch.autograd.functional.jacobian(weighted, theta[m])
        torch.testing.assert_close(rows[m], expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(network.gradient(theta, tape, seeds), rows.sum(1))


def test_local_adam_is_torchs_adam_from_fresh_moments():
    start = torch.randn(2, 4, generator=generator("adam"), dtype=torch.float64)
    matrix = torch.diag(torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64))
    found = local_adam(start, lambda theta: theta @ matrix, torch.tensor([7, 3]), lr=0.01)
    for m, steps in enumerate((7, 3)):
        parameter = nn.Parameter(start[m].clone())
        optimiser = torch.optim.Adam([parameter], lr=0.01)
        for _ in range(steps):
            optimiser.zero_grad()
            (0.5 * parameter @ matrix @ parameter).backward()
            optimiser.step()
        torch.testing.assert_close(found[m], parameter.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", EVERY_EQUATION)
def test_right_hand_side_belongs_to_the_exact_solution(name):
    one = equation(name)
    x = torch.rand(8, one.d, generator=generator("rhs"), dtype=torch.float64)
    u, _, laplacian = (part.detach() for part in derivatives(one.exact, x))
    torch.testing.assert_close(-laplacian + one.reaction(u), one.right(x), rtol=1e-11, atol=1e-11)
    u = u.clone().requires_grad_()
    total = one.reaction(u).sum()
    slope = torch.autograd.grad(total, u)[0] if total.requires_grad else torch.zeros_like(u)
    torch.testing.assert_close(one.slope(u.detach()), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fisher", "poisson-product-3"])
def test_jacobian_belongs_to_the_loss_that_is_trained(name):
    """A^T r is the gradient of F_m, and A the slope of r: so A^T A is the Gauss-Newton matrix of that loss."""
    problem = two_strips(equation(name), 7, 2, 10.0, seed=0)
    theta = problem.network.initial(generator("start")) + 0.05
    a, r = problem.linearise(theta)
    gradient = problem.gradient(theta.expand(2, -1))
    torch.testing.assert_close(torch.einsum("mr,mrp->mp", r, a), gradient, rtol=1e-10, atol=1e-12)
    direction = torch.randn(len(theta), generator=generator("direction"), dtype=torch.float64)
    h = 1e-6
    ahead, behind = problem.linearise(theta + h * direction)[1], problem.linearise(theta - h * direction)[1]
    torch.testing.assert_close(a @ direction, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)
    inside, edge = r[:, :7], r[:, 7:]
    _, plain_inside, _, plain_edge = problem.residuals(theta.expand(2, -1))
    torch.testing.assert_close(inside.square().sum(1), plain_inside.square().mean(1))
    torch.testing.assert_close(edge.square().sum(1), 10.0 * plain_edge.square().mean(1))


def test_strips_hold_only_their_points_and_touched_faces():
    problem = two_strips(poisson(2, "sum"), 50, 5, 1.0, seed=3)
    assert problem.edge.shape == (2, 15, 2)
    for m, (low, high) in enumerate(((0, 0.5), (0.5, 1))):
        for points in (problem.inside[m], problem.edge[m]):
            assert low <= points[:, 0].min()
            assert points[:, 0].max() <= high
        edge = problem.edge[m]
        assert ((edge == 0) | (edge == 1)).any(1).all()
        assert (edge[:, 0] == 1 - m).sum() == 0
    line = two_strips(EQUATIONS["fisher"], 4, 20, 1.0, seed=0)
    assert line.edge[..., 0].tolist() == [[0.0] * 20, [1.0] * 20]


def test_each_client_fits_its_own_interval_only():
    fit = one_dimensional(8, "8-uneven", seed=0, points=30)
    for points, low, high in zip(fit.x, SPLITS_1D["8-uneven"][:-1], SPLITS_1D["8-uneven"][1:], strict=True):
        assert low <= points.min()
        assert points.max() <= high
    square = two_dimensional(seed=0, points=20)
    cells = (square.x * 3).floor().long().clamp(max=2)
    assert [cells[m].unique(dim=0).tolist() for m in range(9)] == [[[m % 3, m // 3]] for m in range(9)]
    height, mx, my, *_ = BUMPS[0]
    assert gaussian_mixture(torch.tensor([[mx, my]], dtype=torch.float64)).item() == pytest.approx(
        height, abs=0.01
    )


def dense_fipa(a, weights, moves, rank, rcond):
    """Eq. 6 as printed, with (p, p) matrices."""
    total, right = 0, 0
    for one, weight, move in zip(a, weights, moves, strict=True):
        lam, U = torch.linalg.eigh(one.T @ one)
        U, lam = U[:, -rank:], lam[-rank:]
        H = U @ torch.diag(lam) @ U.T
        total, right = total + weight * H, right + weight * H @ move
    return torch.linalg.pinv(total, rtol=rcond, hermitian=True) @ right


@pytest.mark.parametrize(("rows", "rank"), [(12, 4), (12, 12), (700, 6)])
def test_merge_is_equation_6_with_dense_matrices(rows, rank):
    source = generator("merge", rows)
    a = torch.randn(3, rows, 30, generator=source, dtype=torch.float64)
    a = a * torch.logspace(0, -3, 30, dtype=torch.float64)  # a falling spectrum, as a network's
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    moves = torch.randn(3, 30, generator=source, dtype=torch.float64)
    sketches = [sketch(one, rank) for one in a]
    found = merge(sketches, weights, [s.U @ move for s, move in zip(sketches, moves, strict=True)], 1e-8)
    torch.testing.assert_close(found, dense_fipa(a, weights, moves, rank, 1e-8), rtol=1e-5, atol=1e-5)


class Linear:
    """Two clients that each see one half of the coordinates well and the other one hardly at all."""

    def __init__(self):
        strong, weak = torch.tensor([3.0, 0.05]), torch.tensor([0.05, 3.0])
        self.a = torch.stack([strong, weak]).diag_embed().double()
        self.weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
        self.solution = torch.tensor([0.3, -0.2], dtype=torch.float64)
        # Each client's own solution is wrong in the coordinate it hardly sees: the drift FedAvg averages in.
        own = torch.tensor([[0.3, 0.4], [-0.5, -0.2]], dtype=torch.float64)
        self.b = torch.einsum("mrp,mp->mr", self.a, own)

    def linearise(self, theta):
        return self.a, self.a @ theta - self.b

    def gradient(self, theta):
        return torch.einsum("mrp,mr->mp", self.a, torch.einsum("mrp,mp->mr", self.a, theta) - self.b)

    def error(self, theta):
        return float((theta - self.solution).norm())


def test_three_rounds_of_fipa_beat_fedavg_on_a_linear_toy():
    start = torch.zeros(2, dtype=torch.float64)
    common = {"epochs": 300, "rounds": 3, "lr": 0.01, "gamma": 1.0}
    fipa = run(Linear(), start, Settings("fipa", **common))
    fedavg = run(Linear(), start, Settings("fedavg", **common))
    assert fipa.errors[-1] < 0.01
    assert fedavg.errors[-1] > 10 * fipa.errors[-1]
    assert len(fipa.errors) == len(fipa.seconds) == 4


def test_gauss_newton_is_the_centralised_step():
    fit = one_dimensional(2, "2", seed=0, points=25)
    start = fit.network.initial(generator("start"))
    a, r = fit.linearise(start)
    A, R = a.flatten(0, 1) * 0.5**0.5, r.flatten() * 0.5**0.5
    H = A.T @ A
    step = -torch.linalg.pinv(H, rtol=1e-5, hermitian=True) @ (A.T @ R)
    found = run(fit, start, Settings("gn", rounds=1, gamma=0.5)).theta - start
    torch.testing.assert_close(found, 0.5 * step, rtol=1e-6, atol=1e-8)


def test_adaptive_rounds_keep_the_caps_and_say_what_they_did():
    fit = one_dimensional(2, "2", seed=0, points=25)
    settings = Settings("fipa", epochs=5, rounds=3, adaptive=True, sums=25, rank=10)
    curve = run(fit, fit.network.initial(generator("start")), settings)
    assert len(curve.ranks) == len(curve.steps) == 3
    assert all(1 <= rank <= 10 for ranks in curve.ranks for rank in ranks)
    assert all(1 <= steps <= 5 for each in curve.steps for steps in each)
    shown = json.loads(json.dumps(curve.thinned(3)))
    assert shown["rounds"] == [0, 2, 3]
    assert shown["final"] == pytest.approx(curve.errors[-1], rel=1e-3)


def test_a_run_ends_with_its_seconds_and_where_the_error_is_not_finite():
    start = torch.zeros(2, dtype=torch.float64)
    assert len(run(Linear(), start, Settings("fedavg", epochs=1, rounds=50, seconds=0.0)).errors) == 2

    class Broken(Linear):
        def error(self, theta):
            return float("nan") if theta.any() else 1.0

    assert len(run(Broken(), start, Settings("fedavg", epochs=1, rounds=50)).errors) == 2
