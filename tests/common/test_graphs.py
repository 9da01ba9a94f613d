"""Similarity graphs: distances and neighbours against loops, incidence, components, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics.graphs import (
    Graph,
    complete_graph,
    components,
    distances,
    graph_of,
    incidence,
    nearest_neighbours,
)


def slow_distance(x, y, metric):
    if metric == "l1":
        return math.fsum(abs(a - b) for a, b in zip(x, y, strict=True))
    if metric == "l2":
        return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return 1 - dot / math.hypot(*x) / math.hypot(*y)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_distances_and_neighbours_are_those_of_a_loop(metric):
    sketches = torch.randn(9, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows, D = sketches.tolist(), distances(sketches, metric)
    slow = [[slow_distance(x, y, metric) for y in rows] for x in rows]
    assert torch.allclose(D, torch.tensor(slow, dtype=torch.float64), atol=1e-12)
    assert torch.equal(D, D.T)
    for k in (1, 3, 8, 20):
        edges = set()
        for i in range(9):
            others = sorted((slow[i][j], j) for j in range(9) if j != i)
            edges |= {(min(i, j), max(i, j)) for _, j in others[:k]}
        assert nearest_neighbours(sketches, k, metric).edges == tuple(sorted(edges))
    assert nearest_neighbours(sketches, 20, metric) == complete_graph(9)


def test_an_edge_found_only_from_the_higher_site_is_kept():
    sketches = torch.tensor([[0.0], [1.0], [10.0]])
    assert nearest_neighbours(sketches, 1, "l1").edges == ((0, 1), (1, 2))


def test_ties_are_broken_by_number_and_equal_sketches_are_at_zero():
    same = torch.ones(5, 3)
    assert nearest_neighbours(same, 1).edges == ((0, 1), (0, 2), (0, 3), (0, 4))
    for metric in ("l1", "l2", "cosine"):
        assert not distances(same, metric).any()
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert nearest_neighbours(line, 1).edges == ((0, 1), (1, 2), (2, 3))


def test_cosine_sees_directions_only_and_near_ones_keep_their_digits():
    sketches = torch.tensor([[1.0, 0.0], [100.0, 0.0], [0.0, 2.0], [1.0, 1e-9]], dtype=torch.float64)
    D = distances(sketches, "cosine")
    assert D[0, 1] == 0
    assert D[0, 2] == pytest.approx(1.0)
    assert D[0, 3] == pytest.approx(0.5e-18, rel=1e-6)


def test_one_site_has_no_edge():
    graph = nearest_neighbours(torch.ones(1, 2), 3)
    assert graph == Graph(1, ())
    assert components(graph) == [[0]]
    assert incidence(graph).shape == (1, 0)


@settings(max_examples=40, deadline=None)
@given(nodes=st.integers(1, 8), data=st.data())
def test_incidence_and_components_are_those_of_the_edges(nodes, data):
    pairs = [(i, j) for i in range(nodes) for j in range(i + 1, nodes)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    turned = [pair[::-1] if data.draw(st.booleans()) else pair for pair in chosen]
    graph = graph_of(nodes, turned)
    assert graph.edges == tuple(sorted(chosen))
    Q = incidence(graph)
    assert Q.shape == (nodes, len(chosen))
    z = torch.arange(nodes, dtype=torch.float64).square()
    assert (z @ Q).tolist() == [float(i**2 - j**2) for i, j in graph.edges]
    assert not Q.sum(dim=0).any()
    # slow components: spread the smallest label until nothing changes
    label = list(range(nodes))
    for _ in range(nodes):
        for i, j in chosen:
            label[i] = label[j] = min(label[i], label[j])
    assert components(graph) == [[n for n in range(nodes) if label[n] == c] for c in sorted(set(label))]
    assert int(torch.linalg.matrix_rank(Q)) == nodes - len(components(graph)) if chosen else True


@pytest.mark.parametrize(
    ("nodes", "edges", "words"),
    [
        (0, [], "at least one site"),
        (3, [(0, 3)], "0 to 2"),
        (3, [(-1, 0)], "0 to 2"),
        (3, [(1, 1)], "different sites"),
        (3, [(0, 1), (1, 0)], "given twice"),
        (3, [(0, 1, 2)], "pair of site numbers"),
        (3, [(0.0, 1.0)], "pair of site numbers"),
        (3, [(True, 2)], "pair of site numbers"),
    ],
)
def test_edges_that_make_no_graph_are_refused(nodes, edges, words):
    with pytest.raises(ValueError, match=words):
        graph_of(nodes, edges)


def test_sketches_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="at least one nearest"):
        nearest_neighbours(torch.ones(3, 2), 0)
    with pytest.raises(ValueError, match="one a site"):
        distances(torch.ones(3))
    with pytest.raises(ValueError, match="one a site"):
        distances(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one a site"):
        distances(torch.ones(3, 0))
    with pytest.raises(ValueError, match="finite"):
        distances(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match="sketch of zeros"):
        distances(torch.tensor([[1.0], [0.0]]), "cosine")
    with pytest.raises(ValueError, match="distance of sketches"):
        distances(torch.ones(2, 2), "l3")
