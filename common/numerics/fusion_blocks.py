"""pFedNet's step of the personal parts for models that are read tensor by tensor, and the scale of its λ.

`fusion.Fusion` solves equation (3) for personal parts that lie in memory as rows (N, d). Here the rows of one tensor are
there at a time. With A what the sites' own steps led to, (3) is min 1/(2η) ‖Z - A‖² + λ Σ_E ‖z_i - z_j‖_p:

* p = 2, one norm over all of a group's parameters: every iterate of ADMM mixes rows of A, since the proximal operator only
  scales whole rows. So Z - 1m = C (A - 1m), m the mean of the rows, with a matrix C (N, N) that depends on A only through the
  Gram matrix of the centred rows. That is summed tensor by tensor, (3) is solved in N coordinates, and C is applied
  tensor by tensor: two passes, no matter how long the model is. (That m moves along unchanged: Qᵀ1 = 0.)
* p = 1: parameters do not interact, so pieces of a tensor are solved on their own.
* p = ∞: the norm needs a group's differences at once, so a group is brought to memory; let each tensor be one.

Connected components do not interact, so each is solved on its own, with its own Gram matrix and its own scale; a site
without an edge is left as it is, to the bit. With Ω the dual, z_i = a_i - η Σ Ω_e over the site's edges and ‖Ω_e‖_q ≤ λ, q dual
to p: a neighbour, whatever it sends, moves a site by at most ηλ.

The scale of λ: a flow Ω with QΩ = (A - mean)/η is dual feasible, and consensus of the component optimal, once
λ ≥ max_e ‖Ω_e‖_q. The flow of least norm, Ω = Qᵀ(QQᵀ)⁺ A/η, gives a bound in closed form: `consensus`. A relative λ is a share
of it: 0 leaves every site alone, 1 makes the sites of a component one. So that one site far off does not choose λ for all
its component, the bound counts at most `CAP` times the median over the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.numerics.fusion import Fused, Fusion
from common.numerics.graphs import components, graph_of, incidence
from common.numerics.proximal import Norm, check_threshold

PIECE = 1 << 22  # values by edge solved at once with p = 1
CAP = 3.0
DUAL: dict[Norm, float] = {1: math.inf, 2: 2.0, "inf": 1.0}

Read = Callable[[str], Tensor]


@dataclass
class Ends:
    """How the solvers of one fusion ended, over all groups.

    Attributes:
        lam: Largest λ that was used, in absolute terms.
        iterations: Most iterations that a group or piece took.
        converged: Whether all ended within their tolerance.
        distance: Mean over the edges of ‖z_i - z_j‖₂ before and after.
    """

    lam: float = 0.0
    iterations: int = 0
    converged: bool = True
    distance: tuple[float, float] = (0.0, 0.0)

    def note(self, lam: float, ended: Fused) -> None:
        """Take in how one solver ended."""
        self.lam = max(self.lam, lam)
        self.iterations = max(self.iterations, ended.iterations)
        self.converged = self.converged and ended.converged


def consensus(fusion: Fusion, A: Tensor) -> float:
    """Return a λ from which on the sites of a connected graph agree: max_e ‖Ω_e‖_q of the least flow, capped.

    Args:
        fusion: Graph, η and p.
        A: Rows (N, d), or their coordinates in any orthonormal basis where p is 2.

    Returns:
        The bound; `CAP` times the median over the edges where that is less, and then consensus is not certain. 0 where
        there is no edge.
    """
    return _capped(_flows(fusion, A))


def _flows(fusion: Fusion, A: Tensor) -> Tensor:
    """Return ‖Ω_e‖_q for every edge, float64 (E,)."""
    if not fusion.graph.edges:
        return torch.zeros(0, dtype=torch.float64)
    Q = incidence(fusion.graph)
    flow = Q.T @ (torch.linalg.pinv(Q @ Q.T, hermitian=True) @ A.to(torch.float64)) / fusion.eta
    return torch.linalg.vector_norm(flow, ord=DUAL[fusion.p], dim=1)


def _capped(flows: Tensor) -> float:
    return min(float(flows.max()), CAP * float(flows.median())) if len(flows) else 0.0


def fuse_blocks(
    fusion: Fusion,
    names: Sequence[str],
    read: Read,
    lam: float,
    *,
    relative: bool = False,
    by_tensor: bool = False,
    ends: Ends | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Solve (3) tensor by tensor.

    Args:
        fusion: Graph, η, p and tolerance.
        names: The tensors.
        read: Returns one tensor of all sites, (N, ...), finite floating point; the same in every call.
        lam: λ ≥ 0; 0 gives what is read to the bit.
        relative: λ is a share of `consensus`, for each group its own.
        by_tensor: Each tensor is a group with a norm of its own; else all together are one, as in the paper.
        ends: Filled with how the solvers ended, once everything is taken.

    Yields:
        Name and new values, (N, ...), float64 (λ = 0: as read), in the order of the names.

    Raises:
        ValueError: Another number of sites, values not finite, or a bad λ.
    """
    check_threshold(lam, "λ")
    ends = ends if ends is not None else Ends()
    squares = torch.zeros(2, len(fusion.graph.edges), dtype=torch.float64)
    parts = [] if lam == 0 else [_Part(fusion, sites) for sites in components(fusion.graph) if len(sites) > 1]
    groups = [[name] for name in names] if by_tensor else [list(names)]
    for group in groups:
        solved = [_group(part.fusion, group, part.reading(read), lam, relative, ends) for part in parts]
        for name in group:
            before = _checked(fusion, read(name))
            after = before
            if parts:
                after = before.to(torch.float64, copy=True)
                for part, results in zip(parts, solved, strict=True):
                    after[part.sites] = next(results)[1]
            for row, values in enumerate((before, after)):
                squares[row] += edge_squares(fusion, values)
            yield name, after
    if len(fusion.graph.edges):
        before_, after_ = squares.sqrt().mean(dim=1).tolist()
        ends.distance = (before_, after_)


class _Part:
    """A connected component with edges: its sites, and the step for its graph alone."""

    def __init__(self, whole: Fusion, sites: list[int]) -> None:
        place = {site: number for number, site in enumerate(sites)}
        edges = [(place[i], place[j]) for i, j in whole.graph.edges if i in place]
        self.sites = sites
        self.fusion = Fusion(
            graph_of(len(sites), edges), eta=whole.eta, p=whole.p, tolerance=whole.tolerance,
            max_iterations=whole.max_iterations,
        )  # fmt: skip

    def reading(self, read: Read) -> Read:
        """Return what reads these sites' rows alone."""
        return lambda name: read(name)[self.sites]


def edge_squares(fusion: Fusion, values: Tensor) -> Tensor:
    """Return ‖z_i - z_j‖² for every edge, float64 (E,), of one tensor of all sites (N, ...)."""
    rows = values.reshape(len(values), -1).to(torch.float64)
    pairs = fusion.graph.edges
    return torch.tensor([float((rows[i] - rows[j]).square().sum()) for i, j in pairs], dtype=torch.float64)


def _group(
    fusion: Fusion, names: Sequence[str], read: Read, lam: float, relative: bool, ends: Ends
) -> Iterator[tuple[str, Tensor]]:
    """Solve one group over a connected graph; yields name and new values."""
    if fusion.p == 2:
        mixing = _mixing(fusion, names, read, lam, relative, ends)
        for name in names:
            before = _checked(fusion, read(name))
            rows = before.reshape(len(before), -1).to(torch.float64)
            mean = rows.mean(dim=0)
            yield name, (mean + mixing @ (rows - mean)).reshape(before.shape)
        return
    if fusion.p == 1:
        flows = [_flows(fusion, _rows(fusion, read(name))) for name in names] if relative else []
        # the largest over the parameters, edge by edge: the dual norm of the whole
        scale = _capped(torch.stack(flows).amax(dim=0)) if flows else 1.0
        for name in names:
            before = _checked(fusion, read(name))
            yield name, _solved(fusion, before, lam * scale, ends)
        return
    parts = [_checked(fusion, read(name)) for name in names]
    widths = [part[0].numel() for part in parts]
    whole = torch.cat([part.reshape(len(part), -1).to(torch.float64) for part in parts], dim=1)
    absolute = lam * consensus(fusion, whole) if relative else lam
    ended = fusion.step(whole, torch.zeros_like(whole), absolute)
    ends.note(absolute, ended)
    for name, before, after in zip(names, parts, ended.Z.split(widths, dim=1), strict=True):
        yield name, after.reshape(before.shape)


def _mixing(
    fusion: Fusion, names: Sequence[str], read: Read, lam: float, relative: bool, ends: Ends
) -> Tensor:
    """Return C (N, N): the new centred rows are C times the old ones. For p = 2."""
    sites = fusion.graph.nodes
    gram = torch.zeros(sites, sites, dtype=torch.float64)
    for name in names:
        rows = _rows(fusion, read(name))
        rows -= rows.mean(dim=0)
        gram += rows @ rows.T
    values, vectors = torch.linalg.eigh(gram)
    # squares of rows: a direction below the square root of the precision cannot be told, and is left as it is
    kept = values > values[-1].clamp(min=0) * 1e-14
    root = values[kept].sqrt()
    coordinates = vectors[:, kept] * root
    if not bool(kept.any()):
        return torch.eye(sites, dtype=torch.float64)
    absolute = lam * consensus(fusion, coordinates) if relative else lam
    ended = fusion.step(coordinates, torch.zeros_like(coordinates), absolute)
    ends.note(absolute, ended)
    mixing = ended.Z @ (vectors[:, kept] / root).T
    rest = vectors[:, ~kept]
    return mixing + rest @ rest.T


def _solved(fusion: Fusion, before: Tensor, lam: float, ends: Ends) -> Tensor:
    """Solve a tensor with p = 1, piece by piece."""
    rows = before.reshape(len(before), -1).to(torch.float64)
    after = torch.empty_like(rows)
    width = max(1, PIECE // len(fusion.graph.edges))
    for start in range(0, rows.shape[1], width):
        piece = rows[:, start : start + width]
        ended = fusion.step(piece, torch.zeros_like(piece), lam)
        ends.note(lam, ended)
        after[:, start : start + width] = ended.Z
    return after.reshape(before.shape)


def _checked(fusion: Fusion, values: Tensor) -> Tensor:
    if values.ndim < 1 or len(values) != fusion.graph.nodes or not values.is_floating_point():
        raise ValueError(
            f"The parts of {fusion.graph.nodes} sites are floating-point values (N, ...), got {tuple(values.shape)} of "
            f"{values.dtype}."
        )
    if not torch.isfinite(values).all():
        raise ValueError("A fusion step needs finite parts.")
    return values


def _rows(fusion: Fusion, values: Tensor) -> Tensor:
    return _checked(fusion, values).reshape(len(values), -1).to(torch.float64, copy=True)
