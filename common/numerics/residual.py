"""The residual of Fisher information between a site's images and the same images in the styles of other sites.

    R_j = reduce over k of | F_j(D→k) − F_j(D) |

F is a diagonal Fisher information (common/numerics/diagonal_fisher.py), D→k the site's data in the style of site k
(common/numerics/spectrum.py). Parameters with a large residual are taken to be sensitive to the domain, the others to be
invariant. The idea is that of pFL-ResFIM (Zhu, Li, Wang, Lam, ISBI 2026), whose public abstract gives no formula: form,
normalisation and the way to split are a reconstruction, and each is a choice here. The normalisation by tensor and the
threshold are those of FedDPA (Yang, Huang, Ye: Dynamic Personalized Federated Learning with Adaptive Differential
Privacy, NeurIPS 2023).

Values are dictionaries of float64 tensors by parameter name; masks are the same in bool, True for sensitive. The order
of parameters is that of the dictionary, and within a tensor that of its memory when contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

Form = Literal["abs", "signed", "relative"]
Reduce = Literal["mean", "max"]
Scale = Literal["tensor", "rank"]
Values = dict[str, Tensor]

NOISE = 1e-12  # of the largest Fisher information; see `residual`


def residual(
    real: Mapping[str, Tensor],
    simulated: Iterable[Mapping[str, Tensor]],
    *,
    form: Form = "abs",
    reduce: Reduce = "mean",
    eps: float = 1e-3,
    noise: float = NOISE,
) -> Values:
    """Return R.

    Some parameters have no Fisher information at all, such as a convolution's bias before an instance normalisation,
    yet rounding leaves them some: in float32 U-Nets up to 1e-15 of the largest, where true values are above 1e-7. A
    normalisation by tensor would blow such noise up to 0 … 1, so small changes are set to 0.

    Args:
        real: F(D) by parameter name, finite, at least 0.
        simulated: F(D→k), one after the other; each is read once, so a generator needs memory for one.
        form: "abs" |ΔF|; "signed" ΔF, so that only growing Fisher information counts as sensitive; "relative"
            |ΔF| / (F(D) + ε mean F(D)).
        reduce: "mean" or "max" over the sites k.
        eps: ε for "relative", above 0: a share of the mean of F(D) over all parameters, so that the result does not
            depend on the scale of the loss.
        noise: A change of at most this share of the largest value of F(D) counts as 0; at least 0.

    Returns:
        float64 tensors by name; at least 0 but for "signed".

    Raises:
        ValueError: No site, names or shapes that differ, values out of range, or a "relative" residual of a Fisher
            information that is 0 everywhere.
    """
    if form not in get_args(Form) or reduce not in get_args(Reduce) or not 0 < eps < math.inf:
        raise ValueError(f"Unknown form '{form}' or reduction '{reduce}', or ε {eps} is not above 0.")
    if not 0 <= noise < 1:
        raise ValueError(f"The share that counts as noise must be at least 0 and below 1, got {noise}.")
    own = _checked(real, like=None, least=0.0)
    least = noise * max(float(value.max()) for value in own.values() if value.numel())
    floor = _floor(own, eps) if form == "relative" else 0.0
    total: Values = {}
    count = 0
    for other in simulated:
        for name, value in _checked(other, like=own, least=0.0).items():
            change = _change(own[name], value, form, least, floor)
            if not count:
                total[name] = change
            elif reduce == "mean":
                total[name] += change
            else:
                torch.maximum(total[name], change, out=total[name])
        count += 1
    if not count:
        raise ValueError(
            "A residual needs the Fisher information under at least one other site's style, got none."
        )
    return {name: value / count for name, value in total.items()} if reduce == "mean" else total


def _floor(real: Values, eps: float) -> float:
    """Return ε mean F(D), which must be above 0."""
    size = sum(value.numel() for value in real.values())
    floor = eps * math.fsum(float(value.sum()) for value in real.values()) / size
    if not floor > 0:
        raise ValueError("A relative residual needs Fisher information above 0 somewhere, got 0 everywhere.")
    return floor


def _change(real: Tensor, simulated: Tensor, form: Form, least: float, floor: float) -> Tensor:
    """Return ΔF of one tensor in its form."""
    change = simulated - real
    change = change.masked_fill_(change.abs() <= least, 0.0)
    if form == "signed":
        return change
    change = change.abs_()
    return change / (real + floor) if form == "relative" else change


def normalise(values: Mapping[str, Tensor], how: Scale = "tensor") -> Values:
    """Bring residuals to 0 … 1.

    Args:
        values: Finite, by name.
        how: "tensor": (R − min) / (max − min) within each tensor, 0 where all of its values are the same. "rank":
            the rank among all values of all tensors, 0 for the smallest and 1 for the largest, equal values sharing
            the mean of their ranks; 0 where all values are the same.

    Returns:
        float64 tensors by name.

    Raises:
        ValueError: An unknown way, no values, or one that is not finite.
    """
    if how not in get_args(Scale):
        raise ValueError(f"Residuals are normalised by {' or '.join(get_args(Scale))}, got '{how}'.")
    own = _checked(values, like=None)
    if how == "tensor":
        return {name: _stretched(value) for name, value in own.items()}
    flat = _flat(own)
    _, place, size = flat.unique(return_inverse=True, return_counts=True)
    after = size.cumsum(0)  # equal values take the ranks after − size … after − 1
    rank = (after - size + after - 1).to(torch.float64) / 2
    return _like(_stretched(rank)[place] if len(flat) > 1 else torch.zeros_like(flat), own)


def sensitive_fraction(
    values: Mapping[str, Tensor], rho: float, *, above: float | None = None
) -> dict[str, Tensor]:
    """Return the mask of the ρ parameters of all with the largest values.

    Exactly ⌈ρ p⌉ are sensitive, ρ taken as it is written (0.1 of 30 is 3); of equal values those that come first.

    Args:
        values: Finite, by name.
        rho: ρ, 0 (none) to 1 (all).
        above: Values at or below it are not sensitive, whatever ρ is; the mask is smaller then. With 0, residuals of 0
            leave everything invariant. With ρ = 1 it has no effect: all stays local.

    Returns:
        bool tensors by name, True for sensitive.

    Raises:
        ValueError: ρ out of its range, no values, or one that is not finite.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"The share of sensitive parameters must be from 0 to 1, got {rho}.")
    own = _checked(values, like=None)
    flat = _flat(own)
    count = math.ceil(Fraction(str(rho)) * len(flat))
    mask = torch.full_like(flat, count == len(flat), dtype=torch.bool)
    if 0 < count < len(flat):
        # a selection, not a sort: the smallest of the largest, and as many equal to it as are still wanted
        place = len(flat) - count
        # torch has no deterministic selection on CUDA
        least = flat.sort().values[place] if flat.is_cuda else flat.kthvalue(place + 1).values
        mask = flat > least
        equal = torch.nonzero(flat == least).flatten()
        mask[equal[: count - int(mask.sum())]] = True
    if above is not None and rho < 1:
        mask &= flat > above
    return _like(mask, own)


def sensitive_above(values: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
    """Return the mask of the values above a threshold τ, which itself is not above it.

    Raises:
        ValueError: No values, one that is not finite, or a threshold that is NaN.
    """
    if math.isnan(tau):
        raise ValueError("The threshold must be a number, got NaN.")
    return {name: value > tau for name, value in _checked(values, like=None).items()}


def invariant_weights(values: Mapping[str, Tensor]) -> Values:
    """Return 1 − R of normalised residuals: how far each parameter is shared, 0 (local) to 1 (shared).

    Raises:
        ValueError: No values, or one that is not in 0 … 1.
    """
    own = _checked(values, like=None, least=0.0)
    if any(bool((value > 1).any()) for value in own.values()):
        raise ValueError("Soft weights need residuals from 0 to 1; call normalise first.")
    return {name: 1 - value for name, value in own.items()}


def smooth(before: Mapping[str, Tensor] | None, now: Mapping[str, Tensor], decay: float) -> Values:
    """Return decay · before + (1 − decay) · now, an exponential moving average over rounds.

    Args:
        before: The last average; None in the first round, which is taken as it is.
        now: This round's values.
        decay: 0 (no memory) to below 1.

    Returns:
        float64 tensors by name.

    Raises:
        ValueError: A decay out of its range, names or shapes that differ, or a value that is not finite.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"The decay must be at least 0 and below 1, got {decay}.")
    current = _checked(now, like=None)
    if before is None or decay == 0:
        return {name: value.clone() for name, value in current.items()}
    last = _checked(before, like=current)
    return {name: decay * last[name] + (1 - decay) * value for name, value in current.items()}


def share(mask: Mapping[str, Tensor]) -> float:
    """Return the share of all parameters that are sensitive.

    Raises:
        ValueError: No parameters, or tensors that are not bool.
    """
    _check_masks([mask])
    return sum(int(part.sum()) for part in mask.values()) / sum(part.numel() for part in mask.values())


def density(mask: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of sensitive parameters by layer: weight and bias of "a.b.weight" and "a.b.bias" are "a.b".

    Raises:
        ValueError: As `share`.
    """
    _check_masks([mask])
    layers: dict[str, dict[str, Tensor]] = {}
    for name, part in mask.items():
        layers.setdefault(name.rpartition(".")[0] or name, {})[name] = part
    return {
        layer: share(parts) for layer, parts in layers.items() if any(part.numel() for part in parts.values())
    }


def overlap(masks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the Jaccard indices |A ∩ B| / |A ∪ B| of the sensitive parameters of sites.

    Args:
        masks: One mask per site, on one device.

    Returns:
        float64 (sites, sites) on the CPU, symmetric, 1 on the diagonal and for two empty masks.

    Raises:
        ValueError: No site, or masks that do not fit each other.
    """
    if not masks:
        raise ValueError("An overlap needs the mask of at least one site, got none.")
    _check_masks(masks)
    result = torch.ones(len(masks), len(masks), dtype=torch.float64)
    for row, first in enumerate(masks):
        for column, second in enumerate(masks[:row]):
            both = sum(int((first[name] & second[name]).sum()) for name in first)
            either = sum(int((first[name] | second[name]).sum()) for name in first)
            result[row, column] = result[column, row] = both / either if either else 1.0
    return result


def _checked(values: Mapping[str, Tensor], *, like: Values | None, least: float | None = None) -> Values:
    """Return values in float64 after checking them."""
    if not sum(value.numel() for value in values.values()):
        raise ValueError("Expected values of at least one parameter, got none.")
    if like is not None and {name: value.shape for name, value in values.items()} != {
        name: value.shape for name, value in like.items()
    }:
        raise ValueError(
            "Both sides must have parameters of the same names and shapes; measure them on one network."
        )
    for name, value in values.items():
        if not torch.isfinite(value).all() or (least is not None and bool((value < least).any())):
            bound = "" if least is None else f" and at least {least:g}"
            raise ValueError(f"The values of '{name}' must be finite{bound}.")
    return {name: value.detach().to(torch.float64) for name, value in values.items()}


def _check_masks(masks: Sequence[Mapping[str, Tensor]]) -> None:
    shapes = {name: part.shape for name, part in masks[0].items()}
    if not sum(part.numel() for part in masks[0].values()):
        raise ValueError("Expected a mask of at least one parameter, got none.")
    for mask in masks:
        if {name: part.shape for name, part in mask.items()} != shapes:
            raise ValueError("The masks of all sites must have the same names and shapes.")
        if any(part.dtype != torch.bool for part in mask.values()):
            raise ValueError("A mask must be bool, True for sensitive parameters.")


def _stretched(value: Tensor) -> Tensor:
    """Return (value − min) / (max − min), 0 where there is no difference."""
    if not value.numel():
        return value.clone()
    least, most = value.min(), value.max()
    # the scale first: a difference of the largest values could overflow, one of the smallest vanish
    scale = torch.maximum(least.abs(), most.abs())
    if not bool(most > least):
        return torch.zeros_like(value)
    return ((value / scale - least / scale) / (most / scale - least / scale)).clamp_(0, 1)


def _flat(values: Values) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def _like(flat: Tensor, values: Values) -> dict[str, Tensor]:
    """Cut a vector into tensors of the names and shapes of others."""
    parts = flat.split([value.numel() for value in values.values()])
    return {
        name: part.reshape(value.shape) for part, (name, value) in zip(parts, values.items(), strict=True)
    }
