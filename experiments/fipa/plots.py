"""The figures: error against rounds and seconds, fitted functions, ranks and epochs. matplotlib, small PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib
from PIL import Image

matplotlib.use("Agg")  # no screen is needed, and none is opened
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito, safe for colour-blind readers; the order is that of the curves.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
DPI = 110


def panels(
    rows: int, columns: int, width: float = 3.4, height: float = 2.7
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its axes as rows of columns."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    return figure, [[cast("Axes", one) for one in row] for row in axes]


def errors(
    axes: Axes, curves: Mapping[str, Sequence[Mapping[str, Any]]], against: str, title: str, what: str
) -> None:
    """Draw the thinned curves of `rounds.Curve`, several seeds of one label in one colour.

    Args:
        axes: Where to draw.
        curves: Label -> thinned curves, one a seed.
        against: `rounds` or `seconds`.
        title: Title.
        what: Name of the error.
    """
    for (label, several), colour in zip(curves.items(), COLOURS, strict=False):
        for place, one in enumerate(several):
            axes.semilogy(
                one[against], one["errors"], color=colour, lw=1.2, label=label if not place else None
            )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("round" if against == "rounds" else "processor seconds, all clients", fontsize=8)
    axes.set_ylabel(what, fontsize=8)
    tidy(axes)


def functions(axes: Axes, x: Sequence[float], curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw functions over [0, 1]; the first is the truth and drawn broad and pale."""
    for place, ((label, values), colour) in enumerate(
        zip(curves.items(), ("#bbbbbb", *COLOURS), strict=False)
    ):
        axes.plot(
            x, values, color=colour, lw=1.2 if place else 3.5, ls="-" if place != 2 else "--", label=label
        )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("x", fontsize=8)
    tidy(axes)


def steps(axes: Axes, rounds: Sequence[int], values: Sequence[Sequence[int]], title: str) -> None:
    """Draw one whole number per client over the rounds."""
    for m, colour in zip(range(len(values[0])), COLOURS, strict=False):
        axes.plot(rounds, [each[m] for each in values], color=colour, lw=1.2, label=f"client {m}")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("round", fontsize=8)
    axes.set_ylim(bottom=0)
    tidy(axes)


def image(figure: Figure, axes: Axes, values: Any, title: str, cut: int = 0) -> None:
    """Draw a square of values over [0, 1]^2 with the clients' borders, `cut` strips in each direction."""
    shown = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="viridis", interpolation="nearest")
    for i in range(1, cut):
        axes.axhline(i / cut, color="white", lw=0.6)
        axes.axvline(i / cut, color="white", lw=0.6)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)


def tidy(axes: Axes) -> None:
    """Small ticks, pale grid, legend."""
    axes.tick_params(labelsize=7)
    axes.grid(color="#e5e5e5", lw=0.5)
    axes.legend(fontsize=6.5, framealpha=0.7)


def save(figure: Figure, path: Path) -> None:
    """Write a small PNG of 256 colours, without a date or version in it: the same curves give the same file."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
