"""How a change becomes few bytes, tensor by tensor: CER, sparse ternary, half precision; and what each leaves out.

With A the change and what is still owed of earlier ones, every tensor on its own:

    U = CER(A)        only for cer, cer-bf16 and cer-stc: piecewise constant values, in row-major order; else U = A
    T = C(U)          STC, a half precision, or U itself
    E = U - T         feedback "stc": only for stc, stc-golomb and cer-stc, nothing else is kept
    E = A - T         feedback "all": also what CER and rounding took away

CER (Zhao et al., pFedNet, Section IV) is defined for a gradient. What travels is the change of a round's local training, so
it is applied to that, as a pseudo-gradient; neighbours are what lies side by side in a tensor's memory, never across
tensors. Its weight in round t of T is

    constant  γ_t = γ        linear  γ_t = γ (T - t) / (T - 1)        sqrt  γ_t = γ / √t

With feedback "stc" CER is a regulariser, as in its paper: what it removes is gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.codecs.ternary import compress as ternary
from common.config import WireConfig
from common.errors import PayloadError
from common.guard import l2_norm, update_norm
from common.numerics.total_variation import cer_tensors
from common.payload import Tensors

BYTES = {
    "stc": "ternary", "stc-golomb": "ternary-golomb", "cer": "piecewise", "cer-bf16": "piecewise-bf16",
    "cer-stc": "piecewise-ternary", "float16": "float16", "bf16": "bf16",
}  # fmt: skip
"""What a run calls a compression -> the codec of its bytes."""
TERNARY = frozenset({"stc", "stc-golomb", "cer-stc"})
CER = frozenset({"cer", "cer-bf16", "cer-stc"})
HALVES = {"float16": torch.float16, "bf16": torch.bfloat16, "cer-bf16": torch.bfloat16}
TRIES = 20


@dataclass(frozen=True)
class Change:
    """One payload's change, in the two parts that travel differently.

    Attributes:
        coded: A before, T after `squeezed`: float32 tensors that the codec takes.
        plain: The payload's other tensors, as they are.
        left: E after `squeezed`.
    """

    coded: Tensors
    plain: Tensors
    left: Tensors


def gamma_at(config: WireConfig, round_: int, rounds: int) -> float:
    """Return γ_t, the weight of CER in a round.

    Args:
        config: γ and its schedule.
        round_: t, from 1 to `rounds`.
        rounds: T. A run of one round has γ, whatever the schedule.

    Raises:
        ValueError: A round that the run does not have.
    """
    if not 1 <= round_ <= rounds:
        raise ValueError(f"Expected a round from 1 to {rounds}, got {round_}.")
    if config.gamma_schedule == "linear" and rounds > 1:
        return config.gamma * (rounds - round_) / (rounds - 1)
    if config.gamma_schedule == "sqrt":
        return config.gamma / math.sqrt(round_)
    return config.gamma


def squeezed(change: Change, config: WireConfig, gamma: float) -> Change:
    """Return a change as it travels.

    Args:
        change: A; tensors float32 of any shape.
        config: The run's; `uplink_codec` is not raw.
        gamma: γ_t ≥ 0; 0 leaves what CER is given as it is, to the bit.

    Raises:
        PayloadError: Values that the codec cannot hold; the tensor is named.
    """
    codec, sent, left = config.uplink_codec, Tensors(), Tensors()
    for name, A in change.coded.items():
        T, E = A, None
        try:
            if codec in CER:
                T = cer_tensors({name: A}, gamma, relative=config.gamma_scale == "relative")[name]
            if codec in TERNARY:
                T, E = ternary(T, config.uplink_p)
        except ValueError as error:
            raise PayloadError(f"Tensor '{name}' cannot be compressed. {error}") from error
        if codec in HALVES:
            T = rounded(T, HALVES[codec])
            if not torch.isfinite(T).all():
                raise PayloadError(
                    f"Tensor '{name}' cannot be compressed: its change is beyond the range of {codec}. Look for "
                    "training that diverged; if such changes are meant, set wire.uplink_codec to bf16 or raw."
                )
        if config.feedback == "all":
            E = A - T
        sent[name] = T
        if E is not None:
            left[name] = E
    return Change(sent, change.plain, left)


def bounded(
    change: Change, base: Mapping[str, Tensor], most: float, config: WireConfig, gamma: float
) -> Change:
    """Compress a change so that what leaves has at most an L2 norm; rounding in the codec counts.

    A is scaled before it is compressed, and what the scaling takes away is dropped, not kept in E.

    Args:
        change: A.
        base: What the plain tensors are measured from; empty where they are changes themselves.
        most: Largest norm over all tensors; 0 has no bound.
        config: The run's.
        gamma: γ_t ≥ 0.

    Raises:
        PayloadError: As `squeezed`.
    """
    if not most:
        return squeezed(change, config, gamma)
    norm = _norm(change, base)
    share = most / norm if norm > most else 1.0
    for number in range(TRIES):
        found = squeezed(change if share == 1.0 else _scaled(change, base, share), config, gamma)
        norm = _norm(found, base)
        if norm <= most:
            return found
        share *= min(most / norm, 1.0 - 2.0 ** (number - 26))
    return squeezed(_scaled(change, base, 0.0), config, gamma)


def rounded(tensor: Tensor, half: torch.dtype) -> Tensor:
    """Return float32 values as they are after a way in half precision."""
    return tensor.to(half).to(torch.float32)


def scaled(tensor: Tensor, base: Tensor | None, share: float) -> Tensor:
    """Return base + share (tensor - base) in the tensor's dtype; tensors that are no floating point stay.

    Args:
        tensor: Any shape.
        base: Of the same shape; zeros where None.
        share: Factor.
    """
    if not tensor.is_floating_point():
        return tensor
    start = base.to(torch.float64) if base is not None else torch.zeros((), dtype=torch.float64)
    return (start + (tensor.to(torch.float64) - start) * share).to(tensor.dtype)


def _scaled(change: Change, base: Mapping[str, Tensor], share: float) -> Change:
    return Change(
        {name: scaled(value, None, share) for name, value in change.coded.items()},
        {name: scaled(value, base.get(name), share) for name, value in change.plain.items()},
        {},
    )


def _norm(change: Change, base: Mapping[str, Tensor]) -> float:
    return math.hypot(l2_norm(change.coded), update_norm(change.plain, base or None))
