"""Similarity graphs of sites: k nearest neighbours on sketches, incidence matrix, connected components.

Reference: Zhao et al.: Medical Federated Model with Mixture of Personalized and Sharing Components (pFedNet), Section
III-A. An edge joins two sites where either is among the other's k nearest: the union of both directions. (Keeping only
the edges found from the lower-numbered site, as a matrix read above its diagonal does, loses a part of them.)

Distances are taken from differences, not from a Gram matrix: they are the same in both directions to the bit, and 0 for
equal sketches. Sites at the same distance are taken by their number, so the graph is a function of the sketches alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["l1", "l2", "cosine"]


@dataclass(frozen=True)
class Graph:
    """An undirected graph without loops or double edges; make it with `graph_of` or `nearest_neighbours`.

    Attributes:
        nodes: Number of sites N ≥ 1.
        edges: Pairs (i, j) with i < j, in growing order.
    """

    nodes: int
    edges: tuple[tuple[int, int], ...]


def graph_of(nodes: int, edges: Iterable[tuple[int, int]]) -> Graph:
    """Return a graph from a list of edges, in any order and direction.

    Args:
        nodes: Number of sites N ≥ 1.
        edges: Pairs of different sites, 0 to N - 1, each pair once.

    Raises:
        ValueError: No site, an end that is no site, a loop, or an edge given twice.
    """
    if nodes < 1:
        raise ValueError(f"A graph of sites needs at least one site, got {nodes}.")
    kept: set[tuple[int, int]] = set()
    for edge in edges:
        if len(edge) != 2 or not all(type(end) is int and 0 <= end < nodes for end in edge):
            raise ValueError(f"An edge is a pair of site numbers from 0 to {nodes - 1}, got {tuple(edge)}.")
        i, j = min(edge), max(edge)
        if i == j:
            raise ValueError(f"An edge joins two different sites, got {tuple(edge)}.")
        if (i, j) in kept:
            raise ValueError(f"The edge {(i, j)} is given twice; an edge has no direction and no weight.")
        kept.add((i, j))
    return Graph(nodes, tuple(sorted(kept)))


def complete_graph(nodes: int) -> Graph:
    """Return the graph in which all sites are neighbours, for N ≥ 1 sites."""
    return graph_of(nodes, ((i, j) for i in range(nodes) for j in range(i + 1, nodes)))


def nearest_neighbours(sketches: Tensor, k: int, metric: Metric = "l2") -> Graph:
    """Return the symmetrised k-nearest-neighbour graph of sites.

    Args:
        sketches: Finite floating-point rows (N, f), one a site, f ≥ 1; computed in float64.
        k: Neighbours of each site, ≥ 1; where fewer other sites exist, all of them.
        metric: "l1", "l2" or "cosine" (1 - cos of the angle).

    Raises:
        ValueError: A shape, value, k or metric that does not fit, or a zero sketch with the cosine distance.
    """
    if k < 1:
        raise ValueError(f"Each site needs at least one nearest neighbour, got {k}.")
    distance = distances(sketches, metric)
    distance.fill_diagonal_(torch.inf)
    nearest = distance.sort(dim=1, stable=True).indices[:, : min(k, len(distance) - 1)].tolist()
    pairs = {(min(i, j), max(i, j)) for i, row in enumerate(nearest) for j in row}
    return graph_of(len(distance), pairs)


def distances(sketches: Tensor, metric: Metric = "l2") -> Tensor:
    """Return the distances of all pairs of sites, float64 (N, N), symmetric to the bit, with a zero diagonal.

    Args:
        sketches: Finite floating-point rows (N, f), N ≥ 1, f ≥ 1.
        metric: "l1", "l2" or "cosine".

    Raises:
        ValueError: As `nearest_neighbours`.
    """
    if metric not in ("l1", "l2", "cosine"):
        raise ValueError(f'The distance of sketches is "l1", "l2" or "cosine", got {metric!r}.')
    if sketches.ndim != 2 or not sketches.numel() or not sketches.is_floating_point():
        raise ValueError(
            f"Sketches are floating-point rows (N, f), one a site, got {tuple(sketches.shape)} of {sketches.dtype}."
        )
    rows = sketches.detach().to(torch.float64)
    if not torch.isfinite(rows).all():
        raise ValueError("Sketches must be finite.")
    if metric == "cosine":
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if not (norms > 0).all():
            raise ValueError("The cosine distance is not defined for a sketch of zeros; take l1 or l2.")
        rows = rows / norms
    result = rows.new_zeros(len(rows), len(rows))
    for i, row in enumerate(rows):
        difference = rows[i + 1 :] - row
        length = torch.linalg.vector_norm(difference, ord=1 if metric == "l1" else 2, dim=1)
        # unit vectors: ‖x - y‖² / 2 = 1 - cos, and no digits are lost for those that nearly agree
        result[i, i + 1 :] = result[i + 1 :, i] = length.square() / 2 if metric == "cosine" else length
    return result


def incidence(graph: Graph) -> Tensor:
    """Return Q, float64 (N, E): in the column of an edge (i, j), i < j, +1 at i and -1 at j.

    Column e of Z Q is z_i - z_j; Q Qᵀ is the Laplacian of the graph.
    """
    Q = torch.zeros(graph.nodes, len(graph.edges), dtype=torch.float64)
    for column, (i, j) in enumerate(graph.edges):
        Q[i, column], Q[j, column] = 1.0, -1.0
    return Q


def components(graph: Graph) -> list[list[int]]:
    """Return the connected components: the sites of each in growing order, components by their first site."""
    label = list(range(graph.nodes))

    def root(node: int) -> int:
        while label[node] != node:
            label[node] = label[label[node]]
            node = label[node]
        return node

    for i, j in graph.edges:
        first, second = sorted((root(i), root(j)))
        label[second] = first
    groups: dict[int, list[int]] = {}
    for node in range(graph.nodes):
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())
