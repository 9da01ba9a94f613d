"""Spectral transfer: an image keeps its phase and takes another site's low-frequency amplitude.

    F = DFT(x)      A = |F| / N      x' = x + Re DFT⁻¹( N λ (A_style − A) e^{i arg F} on the window, 0 elsewhere )

which is the image whose amplitude is (1 − λ) A + λ A_style on a window of low frequencies and whose phases and other
amplitudes are its own. References: Yang, Soatto: FDA: Fourier Domain Adaptation for Semantic Segmentation, CVPR 2020
(λ = 1); Liu, Chen, Qin, Dou, Heng: FedDG: Federated Domain Generalization on Medical Image Segmentation via Episodic
Learning in Continuous Frequency Space, CVPR 2021 (mixing).

* Form. Only the change is transformed back and added, so λ = 0 gives the image back to the bit and what lies outside
  the window is not touched by rounding.
* Window. On an axis of n voxels the bins −b … b, never the Nyquist bin: symmetric, so the result is real. One corner of
  the spectrum with b × b bins, which is also found, is not.
* Size. Amplitudes are divided by the number of voxels N, and a bin k is k cycles over the field of view. In this form
  the low bins stay the same when an image is resampled without loss to another grid over the same field of view; bin 0
  is the magnitude of the mean. So images of different sizes share a window and a style, and none is interpolated.
* Style. By symmetry bins k and −k have the same amplitude; of each pair one is kept. A style is (C, (Π(2b+1) + 1) / 2),
  bin 0 first.
* No phase. Where an image has no amplitude beyond rounding, its phase is noise, and an amplitude put there would be a
  pattern made of noise: such bins stay as they are. An image of zeros stays zeros.
* Sign. Amplitudes have none: an image with a negative mean keeps a negative mean. Where images are z-scored, bin 0 of a
  style says little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Keep = Literal["clip", "rescale", "none"]

ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996; it means 29
NO_AMPLITUDE = 16.0  # times the dtype's epsilon and the largest value: what an FFT leaves of nothing


@dataclass(frozen=True)
class Window:
    """The bins −b … b on every axis.

    Attributes:
        half: b by spatial axis, each at least 0.

    Raises:
        ValueError: No axis, or a negative b.
    """

    half: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.half or min(self.half) < 0:
            raise ValueError(f"A window needs a half-width of at least 0 for each axis, got {self.half}.")

    @property
    def values(self) -> int:
        """Number of amplitudes of a style per channel: one of every pair of bins, and bin 0."""
        return (math.prod(2 * b + 1 for b in self.half) + 1) // 2


def window(
    shape: Sequence[int],
    *,
    beta: float | None = None,
    cutoff: float | None = None,
    spacing: Sequence[float] | None = None,
) -> Window:
    """Return the window of a grid by a cut-off frequency.

    All sites must use one window, so the grid is the federation's nominal one (the patch), not that of an image.

    Args:
        shape: Voxels by axis of the nominal grid.
        beta: Cut-off as a share of the sampling frequency, 0 to 0.5: b = max(1, ⌊β n⌋) on every axis.
        cutoff: Cut-off in cycles per millimetre instead, at least 0, finite: b = max(1, ⌊cutoff · n · spacing⌋).
        spacing: Millimetres by axis, with `cutoff`.

    Returns:
        Window with b at most ⌊(n − 1) / 2⌋, so 0 on axes of one or two voxels. A cut-off of 0 is bin 0 alone.

    Raises:
        ValueError: Both cut-offs or none, or a value out of its range.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"A window needs a grid of at least one voxel on each axis, got {tuple(shape)}.")
    if (beta is None) == (cutoff is None):
        raise ValueError("Give the cut-off either as beta or as cutoff in cycles per millimetre.")
    if beta is not None:
        if spacing is not None or not 0 <= beta <= 0.5:
            raise ValueError(f"beta must be from 0 to 0.5 and goes without spacing, got {beta}.")
        cycles = [beta * size for size in shape]
    else:
        good = spacing is not None and len(spacing) == len(shape) and min(spacing) > 0
        if spacing is None or not good or not all(math.isfinite(step) for step in spacing):
            raise ValueError("A cut-off in cycles per millimetre needs a positive spacing for each axis.")
        if cutoff is None or not 0 <= cutoff < math.inf:
            raise ValueError(
                f"The cut-off must be finite and at least 0 cycles per millimetre, got {cutoff}."
            )
        cycles = [cutoff * size * step for size, step in zip(shape, spacing, strict=True)]
    least = 1 if max(beta or 0, cutoff or 0) > 0 else 0
    return Window(
        tuple(
            min(max(least, math.floor(each + ROUNDING)), (size - 1) // 2)
            for each, size in zip(cycles, shape, strict=True)
        )
    )


def amplitudes(images: Tensor, window: Window) -> Tensor:
    """Return the low-frequency amplitudes of images.

    Args:
        images: Real values (N, C, *S), finite.
        window: Window of as many axes as S has, none wider than the images.

    Returns:
        |F| / number of voxels, (N, C, window.values), bin 0 first: float64 for float64 images, else float32.

    Raises:
        ValueError: Images that do not fit the window, or are not finite.
    """
    return _collapse(_low(_prepared(images, window), window).abs(), window)


def style_of(batches: Iterable[Tensor], window: Window) -> Tensor:
    """Return a site's style: the mean amplitudes of its images.

    Args:
        batches: Images (N, C, *S); batches may differ in N and S.
        window: As of `amplitudes`.

    Returns:
        float64 (C, window.values), on the device of the images. Every image counts the same.

    Raises:
        ValueError: No image, different numbers of channels, or as `amplitudes`.
    """
    total, count = None, 0
    for each in _each(batches, window):
        total = each.clone() if total is None else total.add_(each)
        count += 1
    if total is None:
        raise ValueError("A style needs at least one image, got none.")
    return total / count


def bank_of(batches: Iterable[Tensor], window: Window, size: int, generator: torch.Generator) -> Tensor:
    """Return the amplitudes of some images of a site, drawn without replacement (reservoir sampling).

    More varied than one mean, and closer to single patients.

    Args:
        batches: As of `style_of`.
        window: As of `amplitudes`.
        size: Images wanted, at least 1.
        generator: CPU generator.

    Returns:
        float64 (M, C, window.values), where M is `size`, or the number of images if there are fewer.

    Raises:
        ValueError: As `style_of`, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"A bank of styles needs a size of at least 1, got {size}.")
    bank: list[Tensor] = []
    for number, each in enumerate(_each(batches, window)):
        if number < size:
            bank.append(each)
            continue
        place = int(torch.randint(number + 1, (), generator=generator))
        if place < size:
            bank[place] = each
    if not bank:
        raise ValueError("A bank of styles needs at least one image, got none.")
    return torch.stack(bank)


def transfer(
    images: Tensor,
    style: Tensor,
    window: Window,
    lam: float | Tensor = 1.0,
    *,
    keep: Keep = "clip",
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Return images in another style; see the file's head. Labels stay valid, as no voxel moves.

    Args:
        images: Real values (N, C, *S), finite. Unchanged.
        style: Amplitudes (C, window.values), or (N, C, window.values) for one style per image; at least 0, finite.
        window: Window of the style, none of whose axes is wider than the images.
        lam: λ from 0 (own amplitude) to 1 (the style's), for all or by image (N,).
        keep: What becomes of the intensity range, by image and channel: "clip" to the range of the source, "rescale"
            to it by gain and offset (which takes back a change of bin 0; with bin 0 alone nothing is left), "none".
        limits: Lowest and highest valid value, instead of the source's own.

    Returns:
        Tensor like the images. With λ = 0 and no limits they come back to the bit.

    Raises:
        ValueError: Images, style, λ or limits that do not fit or are out of range.
    """
    source = _prepared(images, window)
    style = _checked_style(style, source, window)
    share = _checked_share(lam, source)
    if keep not in get_args(Keep):
        raise ValueError(f"The intensity range is kept by {', '.join(get_args(Keep))}, got '{keep}'.")
    if limits is not None and not (
        math.isfinite(limits[0]) and math.isfinite(limits[1]) and limits[0] < limits[1]
    ):
        raise ValueError(f"Limits must be finite with the lower one first, got {limits}.")
    low = _low(source, window)
    own = _collapse(low.abs(), window)
    peak = source.abs().flatten(2).amax(dim=2, keepdim=True)
    phase = own > NO_AMPLITUDE * torch.finfo(source.dtype).eps * peak
    gain = torch.where(phase, share * (style - own) / torch.where(phase, own, 1.0), 0.0)
    grid = source.shape[2:]
    change = low.new_zeros(*source.shape[:-1], grid[-1] // 2 + 1)
    change[_bins(window, source)] = low * _expand(gain, window) * math.prod(grid)
    result = source + torch.fft.irfftn(change, s=grid, dim=_axes(window))
    return _in_range(result, source, keep, limits).to(images.dtype)


def _in_range(result: Tensor, source: Tensor, keep: Keep, limits: tuple[float, float] | None) -> Tensor:
    axes = tuple(range(2, source.ndim))
    if keep == "none":
        return result
    if limits is None:
        low, high = source.amin(axes, keepdim=True), source.amax(axes, keepdim=True)
    else:
        low, high = (source.new_full((1,) * source.ndim, limit) for limit in limits)
    if keep == "rescale":
        least, most = result.amin(axes, keepdim=True), result.amax(axes, keepdim=True)
        width = most - least
        scaled = low + (result - least) / torch.where(width > 0, width, 1.0) * (high - low)
        # where nothing is to be brought back, nothing is rounded; a flat image has no gain
        same = (width == 0) | ((least == low) & (most == high))
        result = torch.where(same, result, scaled)
    return torch.minimum(torch.maximum(result, low), high)


def _each(batches: Iterable[Tensor], window: Window) -> Iterator[Tensor]:
    """Yield the float64 amplitudes (C, values) of every image."""
    channels = None
    for images in batches:
        for each in amplitudes(images, window).to(torch.float64):
            if channels is not None and len(each) != channels:
                raise ValueError(
                    f"All images of a style need the same channels, got {channels} and {len(each)}; use one of them."
                )
            channels = len(each)
            yield each


def _prepared(images: Tensor, window: Window) -> Tensor:
    """Check images and return them in a dtype that an FFT exists for."""
    if images.ndim != 2 + len(window.half) or not images.is_floating_point() or 0 in images.shape[1:]:
        raise ValueError(
            f"Expected floating-point images (N, C, *S) with {len(window.half)} spatial axes, got {images.dtype} "
            f"{tuple(images.shape)}."
        )
    grid = images.shape[2:]
    if any(2 * b + 1 > size for b, size in zip(window.half, grid, strict=True)):
        raise ValueError(
            f"Images of {tuple(grid)} voxels do not hold a window of {tuple(2 * b + 1 for b in window.half)} bins. "
            "Use a smaller cut-off, or larger images."
        )
    images = images.detach()
    if not torch.isfinite(images).all():
        # one NaN would spread over the whole image
        raise ValueError("A spectrum needs finite images; found an infinite value or NaN.")
    return images if images.dtype == torch.float64 else images.to(torch.float32)


def _checked_style(style: Tensor, source: Tensor, window: Window) -> Tensor:
    expected = (*source.shape[:2], window.values)
    if tuple(style.shape) not in (expected, expected[1:]):
        raise ValueError(
            f"Expected a style of {expected[1:]} or, by image, {expected} amplitudes, got {tuple(style.shape)}. Measure it "
            "with the same window and channels."
        )
    if not torch.isfinite(style).all() or bool((style < 0).any()):
        raise ValueError("The amplitudes of a style must be finite and at least 0.")
    return style.detach().to(source)


def _checked_share(lam: float | Tensor, source: Tensor) -> Tensor:
    share = torch.as_tensor(lam, dtype=source.dtype, device=source.device)
    if share.shape not in ((), source.shape[:1]) or not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError("λ must be from 0 to 1: one number, or one for each image.")
    return share.reshape(-1, 1, 1)


def _axes(window: Window) -> tuple[int, ...]:
    return tuple(range(-len(window.half), 0))


def _bins(window: Window, like: Tensor) -> tuple[slice | Tensor, ...]:
    """Return the index of the window's bins with k ≥ 0 on the last axis in a spectrum as rfftn gives it."""
    index: list[slice | Tensor] = [slice(None), slice(None)]
    for axis, b in enumerate(window.half):
        after = len(window.half) - 1 - axis
        bins = torch.arange(-b if after else 0, b + 1, device=like.device) % like.shape[2 + axis]
        index.append(bins.reshape(-1, *[1] * after))
    return tuple(index)


def _low(source: Tensor, window: Window) -> Tensor:
    """Return F / N on the window: complex (N, C, 2b+1, …, b+1), bins −b … b, and 0 … b on the last axis."""
    spectrum: Tensor = torch.fft.rfftn(source, dim=_axes(window), norm="forward")
    return spectrum[_bins(window, source)]


def _collapse(part: Tensor, window: Window) -> Tensor:
    """Return one of every pair of bins (N, C, values) of amplitudes like those of `_low`."""
    # in the order of the whole window, bins k and −k stand at equal distances from the middle, which is bin 0
    whole = torch.cat([part[..., 1:].flip(_axes(window)), part], dim=-1)
    return whole.flatten(2)[..., window.values - 1 :]


def _expand(half: Tensor, window: Window) -> Tensor:
    """Undo `_collapse`: the bins with k ≥ 0 on the last axis, exactly symmetric where both of a pair are there."""
    whole = torch.cat([half.flip(-1)[..., :-1], half], dim=-1)
    return whole.unflatten(-1, [2 * b + 1 for b in window.half])[..., window.half[-1] :]
