"""The streamed fusion against the one over whole rows, and the scale of its λ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics import fusion_blocks
from common.numerics.fusion import Fusion
from common.numerics.fusion_blocks import Ends, consensus, fuse_blocks
from common.numerics.graphs import complete_graph, components, graph_of

SHAPES = {"a": (4, 3, 2), "b": (4, 5), "c": (4,)}


def parts(seed: int, offset: float = 0.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) + offset
        for name, shape in SHAPES.items()
    }


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(4, -1) for name in SHAPES], dim=1)


def streamed(fusion, given_parts, lam, **options) -> torch.Tensor:
    return flat(dict(fuse_blocks(fusion, list(SHAPES), given_parts.__getitem__, lam, **options)))


GRAPHS = [complete_graph(4), graph_of(4, [(0, 1), (1, 2), (2, 3)]), graph_of(4, [(0, 3)])]


@pytest.mark.parametrize("p", [1, 2, "inf"])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("lam", [0.05, 0.4, 3.0])
def test_tensor_by_tensor_is_the_step_over_whole_rows(monkeypatch, p, graph, lam):
    monkeypatch.setattr(fusion_blocks, "PIECE", 7)
    A = parts(3)
    fusion = Fusion(graph, eta=0.7, p=p, tolerance=1e-11)
    whole = fusion.step(flat(A), torch.zeros_like(flat(A)), lam)
    torch.testing.assert_close(streamed(fusion, A, lam), whole.Z, rtol=0, atol=1e-8)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, "inf"]), st.sampled_from(GRAPHS), st.booleans())
@settings(max_examples=25, deadline=None)
def test_relative_one_is_consensus_in_each_component_and_zero_is_untouched(seed, p, graph, by_tensor):
    A = parts(seed, offset=1.0)
    fusion = Fusion(graph, eta=0.5, p=p, tolerance=1e-10)
    assert torch.equal(streamed(fusion, A, 0.0, relative=True), flat(A))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion_blocks, "CAP", float("inf"))
        Z = streamed(fusion, A, 1.0, relative=True, by_tensor=by_tensor)
    for sites in components(graph):
        mean = flat(A)[sites].mean(dim=0)
        torch.testing.assert_close(Z[sites], mean.expand(len(sites), -1), rtol=0, atol=1e-6)
        if len(sites) == 1:
            assert torch.equal(Z[sites], flat(A)[sites])


@given(st.integers(0, 10_000), st.sampled_from([1, 2, "inf"]))
@settings(max_examples=10, deadline=None)
def test_sites_come_closer_as_lambda_grows(seed, p):
    A, ends = parts(seed), []
    for lam in (0.0, 0.1, 0.3, 0.6, 1.0):
        ends.append(Ends())
        streamed(Fusion(GRAPHS[1], eta=1.0, p=p), A, lam, relative=True, ends=ends[-1])
    after = [end.distance[1] for end in ends]
    assert after == sorted(after, reverse=True)
    assert after[0] == ends[0].distance[0] > 1
    assert after[-1] < 1e-5
    assert all(end.converged for end in ends)


def test_two_sites_meet_at_half_their_distance():
    graph = complete_graph(2)
    A = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    # min 1/(2η)(‖z1 - a1‖² + ‖z2 - a2‖²) + λ‖z1 - z2‖: they meet where ηλ is half the distance 5
    assert consensus(Fusion(graph, eta=0.5, p=2), A) == pytest.approx(5.0)
    assert consensus(Fusion(graph, eta=1.0, p=1), A) == pytest.approx(2.0)
    assert consensus(Fusion(graph, eta=1.0, p="inf"), A) == pytest.approx(3.5)


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_a_site_far_off_sets_no_scale_for_others_and_moves_a_neighbour_by_no_more_than_the_threshold(p):
    quiet, loud = parts(2), parts(2)
    for name in loud:
        loud[name][3] *= 1e9
    apart = graph_of(4, [(0, 1), (2, 3)])
    alone = graph_of(4, [(0, 1), (1, 2)])
    for graph, others in ((apart, [0, 1]), (alone, [0, 1, 2])):
        fusion = Fusion(graph, eta=1.0, p=p, tolerance=1e-10)
        expected, got = (streamed(fusion, A, 0.3, relative=True) for A in (quiet, loud))
        torch.testing.assert_close(got[others], expected[others], rtol=0, atol=1e-9)
    assert torch.equal(streamed(Fusion(alone, eta=1.0, p=p), loud, 0.3, relative=True)[3], flat(loud)[3])
    fusion, ends = Fusion(complete_graph(4), eta=1.0, p=p, tolerance=1e-8), Ends()
    Z = streamed(fusion, loud, 0.02, ends=ends)  # three edges end at a site, each takes off at most ηλ
    order = {1: torch.inf, 2: 2.0, "inf": 1.0}[p]
    assert (
        torch.linalg.vector_norm(Z - flat(loud), ord=order, dim=1)[:3] <= 3 * 0.02 * (1 + 1e-6) + 1e-6
    ).all()


def test_the_cap_holds_the_scale_near_the_median_edge():
    A = torch.zeros(6, 1, dtype=torch.float64)
    A[5] = 600.0
    fusion = Fusion(complete_graph(6), eta=1.0, p=2)
    assert consensus(fusion, A) == pytest.approx(0.0, abs=1e-9)  # the edges of the five others carry nothing
    A[:5, 0] = torch.arange(5.0)
    assert consensus(fusion, A) == pytest.approx(3.0 * 3.0 / 6)  # the median difference of 15, 3, over N
    assert consensus(Fusion(complete_graph(2), eta=1.0, p=2), A[4:]) == pytest.approx((600 - 4) / 2)


def test_directions_too_small_to_tell_stay():
    A = {"a": torch.zeros(3, 2, dtype=torch.float64)}
    A["a"][0, 0], A["a"][1, 1] = 1e9, 1e-3
    Z = dict(fuse_blocks(Fusion(graph_of(3, [(0, 1), (1, 2)]), eta=1.0), ["a"], A.__getitem__, 1e-9))["a"]
    torch.testing.assert_close(Z, A["a"], rtol=0, atol=1e-6)


def test_a_tensor_on_its_own_does_not_see_the_others():
    A = parts(1)
    fusion = Fusion(GRAPHS[0], eta=1.0, p=2, tolerance=1e-11)
    Z = dict(fuse_blocks(fusion, ["b"], A.__getitem__, 0.2))
    together = dict(fuse_blocks(fusion, list(SHAPES), A.__getitem__, 0.2, by_tensor=True))
    torch.testing.assert_close(Z["b"], together["b"], rtol=0, atol=1e-9)
    assert not torch.allclose(Z["b"], dict(fuse_blocks(fusion, list(SHAPES), A.__getitem__, 0.2))["b"])


def test_a_large_common_part_costs_no_digits():
    A = {name: 1e4 + 1e-3 * value for name, value in parts(5).items()}
    small = {name: 1e-3 * value for name, value in parts(5).items()}
    fusion = Fusion(GRAPHS[1], eta=1.0, p=2, tolerance=1e-11)
    shifted = streamed(fusion, A, 0.3, relative=True) - 1e4
    torch.testing.assert_close(shifted, streamed(fusion, small, 0.3, relative=True), rtol=0, atol=1e-9)


def test_equal_sites_stay_as_they_are():
    A = {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for p in (1, 2, "inf"):
        assert torch.equal(streamed(Fusion(GRAPHS[0], eta=1.0, p=p), A, 0.5, relative=True), flat(A))


def test_what_does_not_fit_is_refused():
    fusion = Fusion(complete_graph(3), eta=1.0)
    with pytest.raises(ValueError, match="3 sites"):
        list(fuse_blocks(fusion, ["a"], lambda name: torch.ones(2, 4), 0.1))
    with pytest.raises(ValueError, match="finite"):
        list(fuse_blocks(fusion, ["a"], lambda name: torch.full((3, 4), torch.nan), 0.1))
    with pytest.raises(ValueError, match="λ"):
        list(fuse_blocks(fusion, ["a"], lambda name: torch.ones(3, 4), -0.1))
