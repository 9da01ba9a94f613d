"""Payloads: what a method sends, named, typed, and saying itself how it is combined.

A `Payload` is a bundle of named tensors with a kind and a few scalar notes. A `PayloadSpec` is the promise a method
makes about one: its name, its kind (what the hospital's policy and ledger know it by), how replies are combined, and
whether its tensors are those of the model. Payloads are checked against their spec at both ends, before anything is
combined: a wrong name, shape, dtype or a value that is not finite is refused by name.

State is the same idea at rest: named tensors and scalar values, nothing else, so that it can be written as safetensors
and JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from common.errors import PayloadError
from common.frames import shown

Scalar = str | int | float | bool
Tensors = dict[str, Tensor]


class Kind(StrEnum):
    """What a payload is, in the words of policy, ledger and byte accounting."""

    MODEL = "model"
    UPDATE = "update"
    FISHER_SKETCH = "fisher-sketch"
    SENSITIVITY_MASK = "sensitivity-mask"
    STYLE_SPECTRUM = "style-spectrum"
    DATA_SKETCH = "data-sketch"
    CLUSTER = "cluster"
    CONTROL = "control"


class Reduce(StrEnum):
    """How the replies' tensors of one name are combined at the server."""

    WEIGHTED_MEAN = "weighted-mean"
    SUM = "sum"
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed-mean"
    NONE = "none"


@dataclass(frozen=True)
class PayloadSpec:
    """Promise about one payload.

    Attributes:
        name: Unique within the method and direction.
        kind: What the policy knows it by.
        reduce: How replies are combined (uplink only).
        like_model: True if its tensors are exactly those of the model that the method lets travel
            (`ServerHalf.travelling`), in name, shape and dtype.
        optional: True if a message may come without it.
        from_received: True if the payload is what was received under its name, trained on; only then has its change a
            meaning from round to round, and may be compressed with error feedback.
        form: What of its kind it is, where a hospital's policy tells forms apart (data sketches).
    """

    name: str
    kind: Kind
    reduce: Reduce = Reduce.WEIGHTED_MEAN
    like_model: bool = True
    optional: bool = False
    from_received: bool = True
    form: str = ""


@dataclass
class Payload:
    """Named tensors of one kind, on the CPU, with scalar notes."""

    name: str
    kind: Kind
    tensors: Tensors = field(default_factory=dict)
    meta: dict[str, Scalar] = field(default_factory=dict)


Payloads = dict[str, Payload]
Template = Mapping[str, Tensor]


@dataclass
class State:
    """Serialisable state of one half of a method: named tensors and scalar values, nothing else.

    Names may carry a namespace before a slash ("model/conv.weight").
    """

    tensors: Tensors = field(default_factory=dict)
    values: dict[str, Scalar] = field(default_factory=dict)

    def part(self, space: str) -> Tensors:
        """Return the tensors of one namespace, without its prefix."""
        prefix = space + "/"
        return {
            name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)
        }

    def having(self, space: str, tensors: Mapping[str, Tensor]) -> State:
        """Return a copy in which one namespace holds exactly these tensors."""
        prefix = space + "/"
        kept = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(prefix)}
        kept.update({prefix + name: tensor for name, tensor in tensors.items()})
        return State(kept, dict(self.values))


def check_payloads(payloads: Payloads, specs: Iterable[PayloadSpec], template: Template, *, who: str) -> None:
    """Check a message's payloads against the method's promise.

    Args:
        payloads: What came, by name.
        specs: What was promised.
        template: The model's tensors (shapes and dtypes are used; "meta" tensors will do).
        who: Alias of the sender, for the sentence.

    Raises:
        PayloadError: Missing or unexpected payload, wrong kind, names, shape or dtype, or a value that is not finite.
    """
    promised = {spec.name: spec for spec in specs}
    for name in payloads:
        if name not in promised:
            raise PayloadError(
                f"{who}: unexpected payload '{shown(name)}'; expected {sorted(promised) or 'none'}.", site=who
            )
    for spec in promised.values():
        payload = payloads.get(spec.name)
        if payload is None:
            if spec.optional:
                continue
            raise PayloadError(
                f"{who}: payload '{spec.name}' is missing; got {_listed(payloads) or 'none'}.", site=who
            )
        if payload.kind != spec.kind:
            raise PayloadError(
                f"{who}: payload '{spec.name}' is of kind '{payload.kind}', expected '{spec.kind}'.", site=who
            )
        if spec.like_model:
            check_like(payload.tensors, template, who=who, what=spec.name)
        check_finite(payload.tensors, who=who, what=spec.name)
        for key, value in payload.meta.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PayloadError(f"{who}: '{spec.name}' note '{shown(key)}' is not finite.", site=who)


def check_like(tensors: Mapping[str, Tensor], template: Template, *, who: str, what: str) -> None:
    """Check that tensors have exactly the template's names, shapes and dtypes.

    Raises:
        PayloadError: Naming the first tensor that differs, with both values.
    """
    if tensors.keys() != template.keys():
        missing = _listed(template.keys() - tensors.keys())
        extra = _listed(tensors.keys() - template.keys())
        raise PayloadError(
            f"{who}: '{what}' has other tensors than the model: missing {missing}, unexpected {extra}.",
            site=who,
        )
    for name, expected in template.items():
        got = tensors[name]
        if got.shape != expected.shape:
            raise PayloadError(
                f"{who}: '{what}' tensor '{name}' has shape {tuple(got.shape)}, expected {tuple(expected.shape)}.",
                site=who,
            )
        if got.dtype != expected.dtype:
            raise PayloadError(
                f"{who}: '{what}' tensor '{name}' is {got.dtype}, expected {expected.dtype}.", site=who
            )


def check_finite(tensors: Mapping[str, Tensor], *, who: str, what: str) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        PayloadError: Naming the tensor and how many values are not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise PayloadError(
                    f"{who}: '{what}' tensor '{shown(name)}' has {bad} values that are not finite.", site=who
                )


def _listed(names: Iterable[str]) -> list[str]:
    """Return the first names in order, as they may stand in a sentence."""
    return [shown(name) for name in sorted(names)[:3]]
