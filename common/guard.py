"""Guards: what is refused before it can enter, or leave, the global model, whatever the method.

`GuardConfig` holds the limits. Payloads were checked against their spec before (`check_payloads`: names, shapes, dtypes,
finite values); here their sizes are. Norms run over floating-point tensors, in float64 and block by block, so that no
full float64 copy of a model is made. A norm that cannot be told, because a value is not finite, counts as infinite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.config import GuardConfig
from common.errors import PayloadError
from common.payload import Kind, Payloads, PayloadSpec

BLOCK = 1 << 20  # values that are brought to float64 at once
SMALL = 1e-280  # below it, and at infinity, squares in float64 have lost their digits


def l2_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the L2 norm over all floating-point tensors; infinite if a value is not finite."""
    return update_norm(tensors, None)


def update_norm(payload_tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor] | None) -> float:
    """Return the L2 norm of the difference to what was sent.

    Args:
        payload_tensors: What came back; floating-point tensors count.
        sent: What was sent. A tensor without a counterpart of its name and shape counts in full.

    Returns:
        The norm; infinite if a value is not finite.
    """
    norms = []
    for name, tensor in payload_tensors.items():
        if tensor.is_floating_point():
            base = sent.get(name) if sent is not None else None
            if base is not None and base.shape != tensor.shape:
                base = None
            norms.append(_tensor_norm(tensor, base))
    return math.hypot(*norms)


def check_size(payloads: Payloads, guard: GuardConfig, *, who: str) -> None:
    """Refuse tensors of absurd size; used at both ends.

    Args:
        payloads: What came.
        guard: `rms` is the limit; 0 allows everything.
        who: Alias of the sender.

    Raises:
        PayloadError: Naming payload and tensor, with both values.
    """
    if guard.rms <= 0:
        return
    for payload in payloads.values():
        for name, tensor in payload.tensors.items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            rms = _tensor_norm(tensor, None) / math.sqrt(tensor.numel())
            if not rms <= guard.rms:
                raise PayloadError(
                    f"{who}: '{payload.name}' tensor '{name}' has root mean square {rms:.4g}, allowed is "
                    f"{guard.rms:.4g}; it is refused. Look for training that diverged or data in wrong units; "
                    "if such values are meant, raise guard.rms.",
                    site=who,
                )


def check_updates(
    payloads: Payloads, specs: Iterable[PayloadSpec], sent: Payloads, guard: GuardConfig, *, who: str
) -> float:
    """Refuse updates that are too large, and measure the others.

    Looked at are payloads like the model, of kind MODEL (the update is the difference to the sent payload of the same
    name, or the payload where none was sent) or UPDATE (the payload itself). `update_ratio` compares with the model sent
    under the payload's name, else the largest model sent, and at least 1. A whole model from a site that was sent none
    has nothing to be compared with, so only `update_norm` limits it.

    Args:
        payloads: What came, already checked against the specs.
        specs: The method's uplink.
        sent: What this site was sent in the round.
        guard: `update_norm` and `update_ratio` are the limits; 0 switches one off.
        who: Alias of the site.

    Returns:
        The largest update's norm; 0.0 if there is no such payload.

    Raises:
        PayloadError: With both numbers and the setting.
    """
    largest = 0.0
    models = {name: payload for name, payload in sent.items() if payload.kind is Kind.MODEL}
    sizes: dict[str, float] = {}
    for spec in specs:
        payload = payloads.get(spec.name)
        if payload is None or not spec.like_model or spec.kind not in (Kind.MODEL, Kind.UPDATE):
            continue
        base = models.get(spec.name) if spec.kind is Kind.MODEL else None
        norm = update_norm(payload.tensors, base.tensors if base else None)
        if guard.update_norm > 0 and not norm <= guard.update_norm:
            raise _too_large(who, spec.name, norm, guard.update_norm, "guard.update_norm")
        if guard.update_ratio > 0 and (models or spec.kind is Kind.UPDATE):
            if not sizes:
                sizes = {name: l2_norm(model.tensors) for name, model in models.items()}
            size = max(sizes[spec.name] if base else max(sizes.values(), default=0.0), 1.0)
            if not norm <= guard.update_ratio * size:
                how = f"guard.update_ratio {guard.update_ratio:.4g} times the model's norm {size:.4g}"
                raise _too_large(who, spec.name, norm, guard.update_ratio * size, how)
        largest = max(largest, norm)
    return largest


def outliers(norms: Mapping[str, float], guard: GuardConfig) -> dict[str, str]:
    """Return the sites whose update is far larger than the others', each with a safe sentence.

    With fewer than three sites nobody can tell which one is off, and with a median of 0 no multiple of it says
    anything: then there are none.

    Args:
        norms: Norm of the round's update by site.
        guard: `outlier` is the allowed multiple of the median norm; 0 switches it off.
    """
    if guard.outlier <= 0 or len(norms) < 3:
        return {}
    middle = statistics.median(norms.values())
    if middle <= 0:
        return {}
    return {
        site: f"{site}: its update has norm {norm:.4g}, the sites' median is {middle:.4g} and guard.outlier allows "
        f"{guard.outlier:.4g} times that; the update is left out. Look for data in wrong units or wrong labels at "
        "the site; if such differences are meant, raise guard.outlier."
        for site, norm in norms.items()
        if not norm <= guard.outlier * middle
    }


def check_state(tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Refuse a global state that is not finite, such as one that overflowed on the way back to the model's dtype.

    Args:
        tensors: The state after aggregation.
        what: What it came from, as the beginning of a sentence ("Round 3").

    Raises:
        PayloadError: Naming the tensor and how many of its values are not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise PayloadError(
                    f"{what}: the round's result is not finite, tensor '{name}' has {bad} of {tensor.numel()} such "
                    "values; the state stays as it was. Lower guard.rms or guard.update_ratio to find the site that "
                    "sends too large values."
                )


def _too_large(who: str, what: str, norm: float, limit: float, setting: str) -> PayloadError:
    return PayloadError(
        f"{who}: the update '{what}' has norm {norm:.4g}, allowed is {limit:.4g} ({setting}); it is refused. Look for "
        "a learning rate that is too high, data in wrong units or a site that does not follow the protocol.",
        site=who,
    )


def _tensor_norm(tensor: Tensor, base: Tensor | None) -> float:
    flat = tensor.detach().reshape(-1)
    other = base.detach().reshape(-1) if base is not None else None
    norms = []
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK].to(torch.float64)
        if other is not None:
            block = block - other[start : start + BLOCK].to(torch.float64)
        norms.append(_block_norm(block))
    return math.hypot(*norms)


def _block_norm(block: Tensor) -> float:
    squares = float(block.square().sum())
    if SMALL < squares < math.inf:
        return math.sqrt(squares)
    peak = float(block.abs().max())
    if not math.isfinite(peak):
        return math.inf
    return peak * math.sqrt(float((block / peak).square().sum())) if peak else 0.0
