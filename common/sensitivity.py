"""How sensitive a network's parameters are to the way other sites' samples look: styles, samples in them, the residual.

A site's style is what the others need in order to imitate its samples (common/numerics/spectrum.py):

    "amplitude"   mean low-frequency amplitudes of its images (C, V), or those of some of them (M, C, V)
    "moments"     for tables: mean and standard deviation of every feature (2, F)

The residual compares the Fisher information over a site's samples as they are with that over the same samples in the
others' styles (common/numerics/residual.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.frames import shown
from common.numerics.diagonal_fisher import Likelihood, Variant, diagonal_fisher
from common.numerics.residual import (
    Form,
    Scale,
    Values,
    normalise,
    residual,
    sensitive_above,
    sensitive_fraction,
)
from common.numerics.residual import Reduce as Over
from common.numerics.rng import generator
from common.numerics.spectrum import Keep, bank_of, style_of, transfer, window
from common.payload import Tensors
from common.resfim import LEVELS, refused
from common.work import SiteWork

SPECTRUM, MOMENTS = "amplitude", "moments"
LEAST, MOST = 8, 64  # samples, where a measurement is to cost about an epoch
LARGEST = 1 << 22  # values of a style: it is kept in every checkpoint and sent to every site
SAME = 1e-5  # of a feature's spread: moments that differ by less are those of standardised columns, rounded

Restyle = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """How a residual is measured.

    Attributes:
        samples: Training samples that a Fisher information is over, an epoch's at most; 0 takes as many as let the whole
            measurement cost about an epoch, between `LEAST` and `MOST`.
        variant: Labels: the true ones, or drawn from the model.
        reference: What is compared with: the samples as they are, or in their own site's style.
        form: Of the residual.
        over: How the residuals of the other sites are reduced.
        beta: Cut-off of the window as a share of the sampling frequency.
        lam: λ, 0 (own style) to 1 (the other's).
        keep: What becomes of an image's range of intensities; see `transfer`.
    """

    samples: int
    variant: Variant
    reference: Literal["real", "own"]
    form: Form
    over: Over
    beta: float
    lam: float
    keep: Keep

    def residual(self, work: SiteWork, names: list[str], own: Tensors, others: Tensors) -> Values:
        """Return R of the work's network as it is now.

        Args:
            work: The site's.
            names: Parameters to measure.
            own: The site's style: one tensor, by form.
            others: The other sites' styles, by "form/site", of the same form and shape.

        Returns:
            float64 tensors by name, on the CPU.

        Raises:
            ValueError: Values that are not finite, or a network that has no gradient by sample.
        """
        form, style = next(iter(own.items()))

        def restyled(site: str, other: Tensor) -> Restyle:
            drawn = generator("transfer", work.ctx.seed, work.ctx.site, site)
            return self.restyler(form, style, other, drawn)

        count = self.samples or max(LEAST, min(MOST, work.visits // (1 + len(others))))
        with work.inspecting() as network:
            plain = restyled(work.ctx.site, style) if self.reference == "own" else lambda images: images
            real = self._fisher(work, network, names, plain, count)
            simulated = (
                self._fisher(work, network, names, restyled(name.partition("/")[2], other), count)
                for name, other in others.items()
            )
            silent = not any(bool(value.any()) for value in real.values())
            how = "abs" if silent else self.form  # nothing to be relative to
            return residual(real, simulated, form=how, reduce=self.over)

    def restyled(self, work: SiteWork, own: Tensors, others: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield what a training sample looks like in the other sites' styles: the first of those that are measured.

        On the CPU, so that the same sample gives the same bytes on every device. A table has no look.

        Args:
            work: The site's.
            own: The site's style: one tensor, by form.
            others: The other sites' styles, by "form/site".

        Yields:
            Alias of the other site, and the sample (2, C, *S): as it is, and in that site's style.
        """
        form, style = next(iter(own.items()))
        sample = next(iter(work.samples(1)), None) if form == SPECTRUM else None
        if sample is None:
            return
        image = sample[0].cpu()
        for name, other in others.items():
            site = name.partition("/")[2]
            drawn = generator("transfer", work.ctx.seed, work.ctx.site, site)
            yield site, torch.cat([image, self.restyler(form, style, other, drawn)(image)])

    def restyler(self, form: str, own: Tensor, other: Tensor, drawn: torch.Generator) -> Restyle:
        """Return a function that brings batches into another style.

        Args:
            form: Form of both styles.
            own: Style of the samples' site.
            other: Style to bring them to.
            drawn: Draws an entry of a bank for every sample, so every pass needs a function of its own.
        """
        if form == MOMENTS:
            return lambda rows: matched(rows, own, other, self.lam)

        def restyle(images: Tensor) -> Tensor:
            style = other
            if other.ndim == 3:
                style = other[torch.randint(len(other), (len(images),), generator=drawn)]
            return transfer(images, style, window(images.shape[2:], beta=self.beta), self.lam, keep=self.keep)

        return restyle

    def _fisher(
        self, work: SiteWork, network: nn.Module, names: list[str], restyle: Restyle, count: int
    ) -> Values:
        """Return F over the fixed samples in some style. Drawn labels are drawn alike in every style."""
        likelihood = Likelihood(work.likelihood.kind, work.likelihood.ignore_index)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for image, label in work.samples(count):
                yield restyle(image), label

        sampled = self.variant == "sampled"
        found = diagonal_fisher(
            network, names, batches, likelihood, variant=self.variant,
            draw=likelihood.draw if sampled else None,
            generator=generator("labels", work.ctx.seed, work.ctx.site, work.ctx.round) if sampled else None,
        )  # fmt: skip
        return {name: value.to("cpu") for name, value in found.items()}


@dataclass(frozen=True)
class Split:
    """How residuals become a mask, or soft shares.

    Attributes:
        soft: Shares in place of a mask.
        scale: How residuals are normalised; see `residual.normalise`.
        tau: τ, the threshold; 0 for the share ρ.
        rho: ρ, the share that is sensitive.
    """

    soft: bool
    scale: Scale
    tau: float
    rho: float

    def masks(self, changes: Values) -> Tensors:
        """Return bool masks, True for sensitive, or with `soft` uint8 shares in 1/255.

        What does not change is not sensitive, also where too little changes to make up ρ.

        Args:
            changes: R, by name.

        Raises:
            ValueError: A residual that is not finite.
        """
        scores = normalise(changes, self.scale)
        if self.soft:
            kept = {name: torch.where(changes[name] > 0, score, 0.0) for name, score in scores.items()}
            return {name: ((1 - score) * LEVELS).round().to(torch.uint8) for name, score in kept.items()}
        scores = {name: torch.where(changes[name] > 0, score, -1.0) for name, score in scores.items()}
        if self.tau:
            return sensitive_above(scores, self.tau)
        return sensitive_fraction(scores, self.rho, above=-0.5)


def fitting_styles(held: Tensors, site: str, most: int, drawn: torch.Generator) -> Tensors:
    """Return the styles that a site measures with: the others' of its own form and shape.

    An odd style harms its sender alone; a site whose own has not come yet gets those of the form that most have.

    Args:
        held: All sites' styles, by "form/site".
        site: Alias.
        most: Styles at most, drawn; 0 for all.
        drawn: Draws them.
    """
    ordered = sorted(held.items())
    forms = {name: (name.partition("/")[0], tuple(style.shape[-2:])) for name, style in ordered}
    own = [forms[name] for name, _ in ordered if name.partition("/")[2] == site]
    fitting = own or [form for form, _ in Counter(forms.values()).most_common(1)]
    others = {k: v for k, v in ordered if forms[k] in fitting and k.partition("/")[2] != site}
    if 0 < most < len(others):
        chosen = torch.randperm(len(others), generator=drawn)[:most].tolist()
        others = {name: others[name] for name in [list(others)[place] for place in sorted(chosen)]}
    return others


def measure_style(
    images: Iterable[Tensor], *, beta: float, bank: int, generator: torch.Generator
) -> tuple[str, Tensor]:
    """Return what a site tells the others of how its samples look.

    Args:
        images: Batches (N, C, *S) of one grid S, or rows (N, F).
        beta: Cut-off of the window as a share of the sampling frequency.
        bank: Spectra of single samples to send; 0 sends the mean of all.
        generator: Draws the samples of a bank.

    Returns:
        The form, `SPECTRUM` or `MOMENTS`, and float32 values on the CPU.

    Raises:
        ConfigError: A bank of a table: its entries would be single rows.
        ValueError: No sample, or values that are not finite.
    """
    each = iter(images)
    first = next(each, None)
    if first is None:
        raise ValueError("A style needs at least one sample, got none.")
    whole = chain([first], each)
    if first.ndim == 2:
        if bank:
            raise ConfigError(
                "pfl-resfim.style 'bank' is for images: of a table it would be single rows. Use style 'mean'."
            )
        return MOMENTS, moments_of(whole).to("cpu", torch.float32)
    bins = window(first.shape[2:], beta=beta)
    style = bank_of(whole, bins, bank, generator) if bank else style_of(whole, bins)
    return SPECTRUM, style.to("cpu", torch.float32)


def moments_of(batches: Iterable[Tensor]) -> Tensor:
    """Return mean and population standard deviation of every feature.

    Args:
        batches: Rows (N, F), at least one; read twice over, so they are kept.

    Returns:
        float64 (2, F).

    Raises:
        ValueError: A value that is not finite.
    """
    rows = torch.cat([batch.to(torch.float64) for batch in batches])
    if not torch.isfinite(rows).all():
        raise ValueError("The moments of a table need finite values; found an infinite value or NaN.")
    return torch.stack([rows.mean(dim=0), rows.std(dim=0, correction=0)])


def matched(rows: Tensor, own: Tensor, other: Tensor, lam: float) -> Tensor:
    """Return rows whose features have moved towards another site's moments: the style transfer of tables.

        x' = x + λ (s' (x − m) / s + m' − x)

    Features whose moments are the same but for rounding stay as they are, and a feature without spread is only shifted.

    Args:
        rows: Values (N, F).
        own: (m, s) of the rows' site (2, F).
        other: (m', s') (2, F).
        lam: λ, 0 to 1.
    """
    x = rows.to(torch.float64)
    (mean, spread), (their_mean, their_spread) = (
        moments.to(x.device, torch.float64) for moments in (own, other)
    )
    gain = torch.where(spread > 0, their_spread / torch.where(spread > 0, spread, 1.0), 1.0)
    scale = torch.maximum(spread, their_spread)
    same = ((their_mean - mean).abs() <= SAME * scale) & ((their_spread - spread).abs() <= SAME * scale)
    moved = x + lam * (gain * (x - mean) + their_mean - x)
    return torch.where(same, rows, moved.to(rows.dtype))


def check_style(tensors: Tensors, others: Mapping[str, Tensor], bank: int, *, who: str) -> None:
    """Refuse what is no style, or not of the form that the other sites' have.

    Args:
        tensors: What came.
        others: Styles held already, by "form/site".
        bank: Spectra that a site may send; 0 for a mean.
        who: Alias of the sender.

    Raises:
        PayloadError: With what was expected.
    """
    if len(tensors) != 1 or next(iter(tensors)) not in (SPECTRUM, MOMENTS):
        names = [shown(name) for name in sorted(tensors)[:3]]
        raise refused(who, f"a style is one tensor '{SPECTRUM}' or '{MOMENTS}', got {names}")
    form, style = next(iter(tensors.items()))
    axes = 3 if bank and form == SPECTRUM else 2
    entries = len(style) if style.ndim else 0
    good = style.ndim == axes and style.dtype == torch.float32 and 0 < style.numel() <= LARGEST
    if not good or (form == MOMENTS and entries != 2) or (axes == 3 and entries > bank):
        raise refused(who, f"its style is {style.dtype} of shape {tuple(style.shape)}, which is none here")
    if bool(((style[1] if form == MOMENTS else style) < 0).any()):
        raise refused(who, "its style has negative amplitudes or standard deviations")
    for name, other in others.items():
        theirs, _, site = name.partition("/")
        if site != who and (theirs, other.shape[-2:]) != (form, style.shape[-2:]):
            raise refused(
                who, f"its style '{form}' is {tuple(style.shape)}, another site's '{theirs}' is {tuple(other.shape)}"
            )  # fmt: skip


def check_styles(others: Tensors, own: Tensors, bank: int) -> None:
    """Refuse styles of other sites that do not have the form and shape of the site's own.

    Args:
        others: What the coordinator sent, by "form/site".
        own: The site's style: one tensor, by form.
        bank: As of `check_style`.

    Raises:
        PayloadError: Naming the other site.
    """
    like = {f"{form}/": style for form, style in own.items()}
    for name, style in others.items():
        form, _, site = name.partition("/")
        check_style({form: style}, like, bank, who=shown(site))
