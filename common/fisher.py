"""Fisher sketches: how a site measures one, what of it travels, how the server takes it in.

A sketch is the leading eigenpairs of a site's Fisher information: rows U (r, p), which lie in the parameters' space, and
their eigenvalues λ (r,). It travels as "U" (float32, bfloat16, or int8 with "scale" (r,)) and "lam" in float64, and may
bring the gradient "g" (p,) along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.errors import PayloadError
from common.numerics.curvature import GGN, LinearHeadGGN, OutputLoss, flat_function, linear_head
from common.numerics.gram import Blocks, combine, gram, solve
from common.numerics.quantise import Codec, pack
from common.numerics.subspace import Eigenpairs, nystrom, subspace_iteration
from common.payload import Tensors
from common.sketches import SketchFile

GRADIENTS = 1.5  # that a column of a product costs; 1.4 was measured on one core (docs/benchmarks.md)
FEW = 4
EXACT = 256  # parameters up to which the matrix is formed whole
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

Operator = GGN | LinearHeadGGN
Samples = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


def fisher_of(
    network: nn.Module,
    names: Sequence[str],
    likelihood: OutputLoss,
    samples: Samples,
    *,
    wanted: int,
    visits: int,
) -> tuple[Operator, int]:
    """Return the Fisher information of some parameters over a site's samples, and how many samples it is over.

    A linear head has a closed form, and a few parameters a small matrix: both take every sample there is.

    Args:
        network: The network in evaluation mode, at the point of interest.
        names: Its parameters, in the order in which they are flattened.
        likelihood: The loss of the logits.
        samples: Yields (image, label) batches of so many samples.
        wanted: Samples where the operator is applied column by column.
        visits: Samples in an epoch.
    """
    head = linear_head(network, names, likelihood, lambda: samples(visits))
    if head is not None:
        return head, visits
    theta, function = flat_function(network, names)
    count = visits if len(theta) <= EXACT else max(1, min(wanted, visits))
    return GGN(function, theta, likelihood, lambda: samples(count)), count


def affordable(budget: float, samples: Samples, visits: int, columns: int, products: int) -> int:
    """Return the samples at which a sketch costs about `budget` epochs, but no fewer than it needs to be one.

    A volume has thousands of labels, so a few say enough; a picture or a row has one, and H over n of them has rank
    n (C - 1) at most.

    Args:
        budget: Epochs' worth of gradients.
        samples: Yields (image, label) batches of so many samples.
        visits: Samples in an epoch.
        columns: Columns of a product with H.
        products: Products of a sketch.
    """
    label = next(iter(samples(1)))[1]
    least = FEW if label.dim() > 1 else FEW * columns
    return max(least, math.floor(budget * visits / (GRADIENTS * columns * max(products, 1))))


def leading(
    operator: Operator,
    rank: int,
    start: Tensor | None,
    *,
    oversampling: int,
    iterations: int,
    warm: int,
    seed: int,
) -> tuple[Eigenpairs, Tensor]:
    """Return the leading eigenpairs and the basis (L, p) to go on from next time.

    Args:
        operator: The matrix.
        rank: Eigenpairs wanted.
        start: The last basis; None at first.
        oversampling: Columns beside them.
        iterations: Subspace iterations from a random start.
        warm: Products with the matrix from the last basis; 0 starts anew.
        seed: Of the random columns.
    """
    theta = operator.theta
    if start is not None and warm:
        start = start.to(theta.device, theta.dtype)
        if warm == 1:
            return nystrom(
                operator, rank, start=start, oversampling=oversampling, seed=seed,
                dtype=theta.dtype, device=theta.device,
            )  # fmt: skip
        return subspace_iteration(
            operator, rank, start=start, oversampling=oversampling, iterations=warm - 1, seed=seed,
            dtype=theta.dtype, device=theta.device,
        )  # fmt: skip
    return subspace_iteration(
        operator, rank, oversampling=oversampling, iterations=iterations, seed=seed,
        dtype=theta.dtype, device=theta.device,
    )  # fmt: skip


def sketch_tensors(U: Tensor, lam: Tensor, codec: Codec) -> Tensors:
    """Return what travels of a sketch."""
    tensors = {name: tensor.to("cpu") for name, tensor in pack(U, codec).items()}
    return {**tensors, "lam": lam.to("cpu", torch.float64)}


def flatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return named tensors as one vector (p,), in their dtype."""
    return torch.cat([tensors[name].reshape(-1) for name in names])


def fisher_weighted(
    blocks: Blocks,
    sigma: Tensor,
    a: Tensor,
    mean: Tensor,
    *,
    beta: float = 0.0,
    damping: float = 0.0,
    gamma: float = 1.0,
    scaled: bool = False,
    rcond: float = 1e-6,
    fallback: float = 0.0,
) -> Tensor:
    """Return the sites' updates weighed by their Fisher information (p,), float64.

        Δ = γ (Ĥ + βI)^† Σ_m w_m Ĥ_m Δ_m + φ β (Ĥ + βI)^{-1} Δ̄,   Ĥ = Σ_m w_m Ĥ_m,   in the limit where β = 0

    The second term is Δ̄ outside all sketches and nothing where Ĥ is large: with γ = φ = 1 the step minimises
    Σ w_m ‖Δ − Δ_m‖²_{Ĥ_m} + β ‖Δ − Δ̄‖².

    Args:
        blocks: The stacked rows V of all sites, block by block.
        sigma: w_m λ of every row (R,).
        a: U_m Δ_m of every row (R,).
        mean: Δ̄ (p,), float64; used where `fallback` is above 0.
        beta: β, absolute.
        damping: Added to β, as a share of the largest eigenvalue of Ĥ.
        gamma: γ.
        scaled: Whether the first term is multiplied by β, as the published code of FIPA does.
        rcond: With β = 0, eigenvalues of Ĥ below this share of the largest count as zero.
        fallback: φ, 0 to 1.
    """
    products, along = gram(blocks, (lambda where: mean[where]) if fallback else None)
    root = sigma.sqrt()
    if damping and len(root):
        beta += damping * float(torch.linalg.eigvalsh(products * root * root[:, None])[-1])
    gain = gamma * (beta if scaled else 1.0)
    coefficients = solve(products, sigma, gain * a - fallback * along, beta=beta, rcond=rcond)
    step = mean * fallback
    for where, part in combine(blocks, coefficients):
        step[where] += part
    return step


def check_sketch(tensors: Tensors, size: int, rank: int, codec: Codec, *, gradient: bool, who: str) -> None:
    """Refuse a sketch that is not of the promised form; its values are known to be finite.

    Args:
        tensors: What came.
        size: p, the number of sketched parameters.
        rank: Most eigenpairs.
        codec: How U travels.
        gradient: Whether the gradient comes along.
        who: Alias of the site.

    Raises:
        PayloadError: Naming what is wrong, with both values.
    """

    def refuse(expected: str, got: object) -> PayloadError:
        return PayloadError(
            f"{who}: a Fisher sketch has {expected} here, got {got}; it is refused. Run the same version and settings "
            "at both ends.", site=who,
        )  # fmt: skip

    names = {"U", "lam"} | ({"scale"} if codec == "int8" else set()) | ({"g"} if gradient else set())
    if tensors.keys() != names:
        raise refuse(f"the tensors {', '.join(sorted(names))}", f"{len(tensors)} of other names")
    U, lam = tensors["U"], tensors["lam"]
    rows, most = (len(U) if U.dim() == 2 else -1), min(rank, size)
    if not 0 <= rows <= most or U.shape[1] != size or U.dtype != DTYPES[codec]:
        raise refuse(
            f"U of at most {most} rows of {size} values, {DTYPES[codec]}", f"{tuple(U.shape)}, {U.dtype}"
        )
    if lam.dtype != torch.float64 or lam.shape != (rows,):
        raise refuse(f"{rows} eigenvalues, torch.float64", f"{tuple(lam.shape)}, {lam.dtype}")
    if bool((lam < 0).any()):
        raise refuse("eigenvalues of at least 0", f"{float(lam.min()):.3g}")
    if bool((tensors.get("scale", lam) < 0).any()):
        raise refuse("scales of at least 0", f"{float(tensors['scale'].min()):.3g}")
    for name, shape in (("scale", (rows,)), ("g", (size,))):
        tensor = tensors.get(name)
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise refuse(
                f"'{name}' of shape {shape}, torch.float32", f"{tuple(tensor.shape)}, {tensor.dtype}"
            )


@dataclass
class Stack:
    """The sketches of a round: U in a file, and per site the few numbers that go with it.

    Attributes:
        names: The sketched parameters.
        theta: Their values at the broadcast point (p,), float64.
        sketches: The rows of all sites.
        rows: Cases, discount, λ and U Δθ by site.
        sent: Cases and tensors by site, where they are to be remembered.
        gradient: Σ N_m g_m, where gradients come along.
    """

    names: list[str]
    theta: Tensor
    sketches: SketchFile = field(default_factory=SketchFile)
    rows: list[tuple[int, float, Tensor, Tensor]] = field(default_factory=list)
    sent: dict[str, tuple[int, Tensors]] = field(default_factory=dict)
    gradient: Tensor | None = None

    def put(
        self, site: str, cases: int, tensors: Tensors, step: Tensor | None, discount: float = 1.0
    ) -> None:
        """Take in a sketch.

        Args:
            site: Alias.
            cases: Its training cases.
            tensors: What travelled.
            step: The site's Δθ (p,), float64; None for a missing site, which asks to stay where θ is.
            discount: Factor on its weight.

        Raises:
            PayloadError, StorageError: As of `SketchFile.put`.
        """
        lam, scale = tensors["lam"].to(torch.float64), tensors.get("scale")
        along = torch.zeros_like(lam)
        if step is not None:
            for row, u in enumerate(tensors["U"]):  # row by row: in float64 all of them would be 2 r models
                along[row] = torch.dot(u.to(torch.float64), step)
            along *= 1.0 if scale is None else scale.to(torch.float64)
        self.sketches.put(site, tensors["U"], scale)
        self.rows.append((cases, discount, lam, along))

    def add_gradient(self, cases: int, gradient: Tensor) -> None:
        """Take in a site's gradient (p,)."""
        term = gradient.to(torch.float64) * cases
        self.gradient = term if self.gradient is None else self.gradient.add_(term)

    def weigh(self) -> tuple[Tensor, Tensor]:
        """Return (N_m/N) λ and U Δθ of all rows (R,), in the order of the file."""
        total = sum(cases * discount for cases, discount, *_ in self.rows)
        sigma = [lam * (discount * cases / total) for cases, discount, lam, _ in self.rows]
        return torch.cat(sigma), torch.cat([along for *_, along in self.rows])
