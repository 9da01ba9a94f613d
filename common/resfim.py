"""pFL-ResFIM's payloads: the style of a site, samples in another site's style, masks and the values that they leave.

style        "amplitude": mean low-frequency amplitudes of a site's images (C, V), or of some of them (M, C, V)
             "moments": for tables mean and standard deviation of every feature (2, F); see common/numerics/spectrum.py
mask         by parameter, True for sensitive; as bytes, the number of True and their coded positions. A parameter
             without any has no entry.
values       by tensor: in its own shape where nothing of it is sensitive; the invariant values in order (k,) where some
             are; no entry where all are
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.codecs.fields import CodecError, Reader, varint
from common.codecs.positions import MAX_PLACES, decode_positions, encode_positions
from common.errors import PayloadError
from common.frames import shown
from common.payload import State, Template, Tensors

LEVELS = 255  # of a soft mask, one byte a parameter
MEASURED = "resfim.measured"

Masks = dict[str, Tensor]


def pack_masks(masks: Mapping[str, Tensor]) -> Tensors:
    """Return masks as bytes: uint8 by name, without the names of empty masks."""
    codes = {}
    for name, mask in masks.items():
        flat = mask.detach().to("cpu").reshape(-1).numpy()
        places = np.flatnonzero(flat).astype(np.int64)
        if len(places):
            code = varint(len(places)) + encode_positions(places, len(flat))
            codes[name] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    return codes


def unpack_masks(codes: Mapping[str, Tensor], like: Template, *, who: str) -> Masks:
    """Undo `pack_masks`.

    Args:
        codes: Bytes by name.
        like: Tensors with the shapes of the parameters that may have a mask.
        who: Alias of the sender.

    Returns:
        bool tensors in these shapes, by the names in `codes`; the others' masks are empty.

    Raises:
        PayloadError: A name without a parameter, or bytes that are no mask of it.
    """
    masks = {}
    for name, code in codes.items():
        if name not in like or code.dtype != torch.uint8 or code.ndim != 1:
            raise refused(who, f"'{shown(name)}' is no coded mask of a parameter that may have one")
        shape = like[name].shape
        reader = Reader(code.contiguous().numpy().tobytes())
        try:
            count = reader.varint("sensitive values", min(shape.numel(), MAX_PLACES))
            places, _ = decode_positions(reader.rest(), shape.numel(), count)
        except CodecError as error:
            raise refused(who, f"the mask of '{name}' cannot be read: {error}") from error
        mask = torch.zeros(shape.numel(), dtype=torch.bool)
        mask[torch.from_numpy(places)] = True
        masks[name] = mask.reshape(shape)
    return masks


def kept_values(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensors:
    """Return the values that masks leave, in the form of the file's head."""
    kept = {}
    for name, tensor in tensors.items():
        mask = masks.get(name)
        if mask is None or not bool(mask.any()):
            kept[name] = tensor
        elif not bool(mask.all()):
            kept[name] = tensor[~mask]
    return kept


def expected_values(masks: Tensors, model: Tensors, names: Iterable[str], *, soft: bool, who: str) -> Tensors:
    """Return the values that a site must have sent, with those of the model in their place.

    Args:
        masks: What it sent: coded masks, or soft ones.
        model: The model that travels.
        names: Parameters that may have a mask.
        soft: Which of them they are.
        who: Alias of the sender.

    Raises:
        PayloadError: Masks that are none.
    """
    like = {name: model[name] for name in names}
    if soft:
        check_shares(masks, like, who=who)
        return model
    return kept_values(model, unpack_masks(masks, like, who=who))


def check_kept(values: Tensors, base: Mapping[str, Tensor], *, who: str) -> None:
    """Check that values are exactly those that a mask leaves.

    Args:
        values: What came.
        base: `kept_values` of the model under the mask that came.
        who: Alias of the sender.

    Raises:
        PayloadError: With expected and found shape.
    """
    for name in [*(values.keys() - base.keys()), *(base.keys() - values.keys())]:
        what = "brings" if name in values else "lacks"
        raise refused(who, f"the answer {what} '{shown(name)}', and its mask says otherwise")
    for name, expected in base.items():
        got = values[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise refused(
                who, f"'{name}' is {got.dtype} of shape {tuple(got.shape)}, its mask leaves {expected.dtype} of shape "
                f"{tuple(expected.shape)}",
            )  # fmt: skip


def check_shares(shares: Tensors, like: Template, *, who: str) -> None:
    """Check soft masks: one byte a parameter, for every parameter.

    Raises:
        PayloadError: Names, shapes or dtypes that differ.
    """
    if shares.keys() != like.keys():
        raise refused(who, f"{len(shares)} soft masks came, expected one for each of {len(like)} parameters")
    for name, expected in like.items():
        if shares[name].shape != expected.shape or shares[name].dtype != torch.uint8:
            raise refused(who, f"the soft mask of '{name}' must be bytes of shape {tuple(expected.shape)}")


def whole_shares(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensors:
    """Return the soft masks that share everything."""
    return {name: torch.full_like(tensors[name], LEVELS, dtype=torch.uint8) for name in names}


def assembled(
    received: Mapping[str, Tensor], own: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Tensors:
    """Return a site's weights: received where it is invariant, its own elsewhere.

    Args:
        received: What came.
        own: The site's own weights; tensors that are not in `received` are taken from here.
        masks: bool, True for the own value; or uint8, the share of the received one in 1/255.
    """
    weights = {**own, **received}
    for name, mask in masks.items():
        if name not in own or name not in received:
            continue
        if mask.dtype == torch.bool:
            weights[name] = torch.where(mask, own[name], received[name])
        else:
            share = mask.to(torch.float64) / LEVELS
            mixed = share * received[name].to(torch.float64) + (1 - share) * own[name].to(torch.float64)
            weights[name] = mixed.to(received[name].dtype)
    return weights


def shares(masks: Tensors, like: Template, *, soft: bool, who: str) -> tuple[Tensors, Masks]:
    """Return what a site shares of each tensor, from what it sent.

    Args:
        masks: Coded masks, or with `soft` the shares in 1/255.
        like: Tensors with the shapes of the parameters that may have a mask.
        soft: Which of them they are.
        who: Alias of the sender.

    Returns:
        bool tensors, True where shared, or float64 shares from 0 to 1; and the masks, which soft ones are not.

    Raises:
        PayloadError: As `unpack_masks`.
    """
    if soft:
        return {name: mask.to(torch.float64) / LEVELS for name, mask in masks.items()}, {}
    sensitive = unpack_masks(masks, like, who=who)
    return {name: ~mask for name, mask in sensitive.items()}, sensitive


def measured(state: State) -> set[str]:
    """Return the sites that have measured their masks, as the coordinator noted; the others it sends styles at once."""
    return set(json.loads(str(state.values.get(MEASURED, "[]"))))


def having_measured(state: State, sites: Iterable[str]) -> State:
    """Return the coordinator's state in which these sites have measured, too."""
    before = measured(state)
    after = sorted(before.union(sites))
    return (
        State(state.tensors, state.values | {MEASURED: json.dumps(after)})
        if len(after) > len(before)
        else state
    )


class Holders:
    """Running sums over the sites that share a value, coordinate by coordinate: two models in float64, no more.

    Where all sites share a tensor the operations, and so the bits, are those of `ServerHalf.fold` and `finish`.
    """

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._weights: Tensors = {}

    def add(self, name: str, value: Tensor, cases: int, share: Tensor | None, shape: torch.Size) -> None:
        """Take in one site's tensor.

        Args:
            name: The tensor's name.
            value: Its values: all, or where `share` is bool those where it is True, in order.
            cases: The site's training cases.
            share: None where all values count the same; bool where some are there; else the share of each, 0 to 1.
            shape: The whole tensor's.
        """
        term = value.to(torch.float64, copy=True)
        if share is not None and share.dtype == torch.bool:
            if name not in self._sums:
                self._sums[name] = torch.zeros(shape, dtype=torch.float64)
                self._weights[name] = torch.zeros(shape, dtype=torch.float64)
            self._sums[name][share] += term.mul_(float(cases))
            self._weights[name][share] += float(cases)
            return
        weight = torch.full(shape, float(cases), dtype=torch.float64)
        if share is not None:
            weight.mul_(share)
        term.mul_(weight)
        if name in self._sums:
            self._sums[name].add_(term)
            self._weights[name].add_(weight)
        else:
            self._sums[name], self._weights[name] = term, weight

    def mean(self, name: str, old: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the mean over the holders in float64, the old value where there are none, and where that is.

        Args:
            name: The tensor's name; its sums are used up.
            old: The value before.
            least: Fewest cases that must share a value for a mean to be taken; 0: any.

        Returns:
            Values of the tensor's shape, and a bool tensor that is True where the old one stayed.
        """
        if name not in self._sums:
            return old.to(torch.float64), torch.ones(old.shape, dtype=torch.bool)
        total, weight = self._sums.pop(name), self._weights.pop(name)
        stays = (weight <= 0) | (weight < least)
        return torch.where(stays, old.to(torch.float64), total / weight.masked_fill(stays, 1.0)), stays


def refused(who: str, why: str) -> PayloadError:
    """Return the error for an answer that is not of the promised form."""
    return PayloadError(f"{who}: {why}; the answer is refused. Let both ends run the same version.", site=who)
