"""The paper's figures of function fitting (its Fig. 2), run again.

Run one figure: `python -m experiments.fipa.functions --figure 1d --out build/experiments/fipa`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from common.numerics.rng import generator
from experiments.fipa import plots
from experiments.fipa.fitting import Fit, one_dimensional, two_dimensional
from experiments.fipa.record import Book
from experiments.fipa.rounds import Curve, Settings

# n of sin(n pi x), split, FIPA's rounds, seeds, seeds with FedAvg beside them. The reference has 30 seconds for each.
CASES_1D = (
    (2, "2", 150, (0, 1, 2), (0, 1, 2)),
    (2, "2-uneven", 150, (0,), (0,)),
    (4, "4", 140, (0, 1, 2), (0,)),
    (4, "4-uneven", 140, (0,), (0,)),
)
EPOCHS = 20  # per round, as in the plotted figures of the reference


class Figure(StrEnum):
    """The figures of this script."""

    one = "1d"
    variants = "1d-variants"
    eight = "1d-eight"
    newton = "gauss-newton"
    adaptive = "adaptive"
    two = "2d"


def fipa_and_controls(
    book: Book, part: str, fit: Fit, start: torch.Tensor, settings: Settings
) -> dict[str, Curve]:
    """Run FIPA; FedAvg with the same epochs until FIPA's seconds; FedAvg with 1000 epochs, as the paper plots it.

    Within FIPA's seconds FedAvg does more rounds, so its curve also holds the state at equal local work.
    """
    fipa = book.curve(part, f"FIPA r={settings.rank} E={settings.epochs}", fit, start, settings)
    found = {"FIPA": fipa}
    for name, epochs in (("same", settings.epochs), ("long", 1000)):
        control = Settings(
            "fedavg", epochs=epochs, rounds=20 * (len(fipa.errors) - 1), seconds=fipa.seconds[-1]
        )
        found[name] = book.curve(part, f"FedAvg E={epochs}", fit, start, control)
    return found


def summary(curves: dict[str, Curve]) -> dict[str, float]:
    """Return the errors at equal local work and at equal processor time."""
    fipa, same, long = curves["FIPA"], curves["same"].errors, curves["long"].errors
    rounds = len(fipa.errors) - 1
    return {
        "FIPA final": fipa.errors[-1],
        "FIPA best": min(fipa.errors),
        "FedAvg at equal local work": same[min(rounds, len(same) - 1)],
        "FedAvg at equal seconds": same[-1],
        "FedAvg E=1000 at equal seconds": long[-1],
        "FedAvg best": min(same + long),
        "seconds": round(fipa.seconds[-1], 2),
    }


def seeded(n: int, split: str, seed: int) -> tuple[Fit, torch.Tensor]:
    """Return one 1-D problem and its start; the start is the same for every method."""
    fit = one_dimensional(n, split, seed)
    return fit, fit.network.initial(generator("network", seed))


def small(values: torch.Tensor, every: int = 8) -> list[float]:
    """Return every n-th value, rounded, for the JSON file."""
    return [round(value, 4) for value in values[::every].tolist()]


def fitted(fit: Fit, curves: dict[str, Curve]) -> dict[str, list[float]]:
    """Return the target, FIPA's and FedAvg's functions on a thin grid."""
    found = {"truth": fit.test_y, "FIPA": fit.predict(curves["FIPA"].theta)}
    found["FedAvg E=1000"] = fit.predict(curves["long"].theta)
    return {label: small(values) for label, values in found.items()}


GRID = small(torch.linspace(0, 1, 1024, dtype=torch.float64))


def figure_1d(book: Book) -> None:
    """Draw test MSE against time and the fitted functions, FIPA (rank 20) beside FedAvg."""
    figure, axes = plots.panels(2, len(CASES_1D))
    table: dict[str, dict[str, float]] = {}
    drawn: dict[str, dict[str, list[float]]] = {}
    for column, (n, split, rounds, seeds, compared) in enumerate(CASES_1D):
        part = f"n={n}, {split}"
        for seed in seeds:
            fit, start = seeded(n, split, seed)
            settings = Settings("fipa", epochs=EPOCHS, rounds=rounds, rank=20)
            if seed not in compared:
                book.curve(part, f"FIPA r=20 E={EPOCHS}", fit, start, settings)
                continue
            curves = fipa_and_controls(book, part, fit, start, settings)
            table[f"{part}, seed {seed}"] = summary(curves)
            drawn.setdefault(part, fitted(fit, curves))
        plots.errors(
            axes[0][column], book.results[part], "seconds", f"sin({n}πx), clients {split}", "test MSE"
        )
        plots.functions(axes[1][column], GRID, drawn[part], "seed 0")
    plots.save(figure, book.path(".png"))
    book.write({"table": table, "fitted": drawn})


def figure_eight(book: Book) -> None:
    """Draw sin(8 pi x) on eight uneven clients: the reference's cut-off 1e-5 of H^+, and 1e-6."""
    figure, axes = plots.panels(1, 3)
    table: dict[str, dict[str, float]] = {}
    drawn: dict[str, list[float]] = {}
    parts = {cut: f"rcond {cut:g}" for cut in (1e-5, 1e-6)}
    for seed in (0, 1, 2):
        part = parts[1e-6]
        fit, start = seeded(8, "8-uneven", seed)
        settings = Settings("fipa", epochs=EPOCHS, rounds=140, rank=20, rcond=1e-6)
        if seed:
            book.curve(part, f"FIPA r=20 E={EPOCHS}", fit, start, settings)
            continue
        curves = fipa_and_controls(book, part, fit, start, settings)
        table[f"{part}, seed {seed}"] = summary(curves)
        drawn = fitted(fit, curves)
    fit, start = seeded(8, "8-uneven", 0)
    for label, settings in {
        "FIPA r=20 E=20": Settings("fipa", epochs=20, rounds=100, rank=20),
        "FIPA r=20 E=200": Settings("fipa", epochs=200, rounds=20, rank=20),
        "FIPA full rank E=20": Settings("fipa", epochs=20, rounds=50),
        "centralised Gauss-Newton": Settings("gn", rounds=40),
    }.items():
        book.curve(parts[1e-5], label, fit, start, settings)
    for place, part in zip(axes[0], parts.values(), strict=False):
        plots.errors(place, book.results[part], "seconds", f"sin(8πx), 8 uneven clients, {part}", "test MSE")
    plots.functions(axes[0][2], GRID, drawn, "rcond 1e-6, seed 0")
    plots.save(figure, book.path(".png"))
    book.write({"table": table, "fitted": drawn})


def figure_variants(book: Book) -> None:
    """Draw what rank, server step, cut-off and local epochs change: two clients, seed 0."""
    figure, axes = plots.panels(1, 1, width=4.8, height=3.8)
    part = "n=2, 2"
    fit, start = seeded(2, "2", 0)
    for label, settings in {
        "r=20 (reference)": Settings("fipa", rounds=120, rank=20),
        "full rank": Settings("fipa", rounds=120),
        "r=5": Settings("fipa", rounds=120, rank=5),
        "r=20, γ=1 (paper)": Settings("fipa", rounds=120, rank=20, gamma=1.0),
        "r=20, rcond 1e-6": Settings("fipa", rounds=120, rank=20, rcond=1e-6),
        "r=20, rcond 1e-8": Settings("fipa", rounds=120, rank=20, rcond=1e-8),
        "r=20, E=200": Settings("fipa", epochs=200, rounds=30, rank=20),
    }.items():
        book.curve(part, label, fit, start, settings)
    plots.errors(axes[0][0], book.results[part], "seconds", "sin(2πx), 2 clients", "test MSE")
    plots.save(figure, book.path(".png"))
    book.write()


def figure_newton(book: Book) -> None:
    """Draw FIPA with more and more local epochs against centralised Gauss-Newton, over rounds (Fig. 2C)."""
    fit, start = seeded(2, "2", 0)
    figure, axes = plots.panels(1, 1, width=4.6, height=3.6)
    part = "n=2, 2"
    book.curve(part, "centralised Gauss-Newton", fit, start, Settings("gn", rounds=25))
    for epochs in (20, 200, 1000):
        book.curve(part, f"FIPA E={epochs}", fit, start, Settings("fipa", epochs=epochs, rounds=25))
    longer = Settings("fipa", epochs=1000, rounds=25, lr=1e-3)
    book.curve(part, "FIPA E=1000, Adam 1e-3", fit, start, longer)
    plots.errors(
        axes[0][0], book.results[part], "rounds", "sin(2πx), 2 clients, full rank, γ=0.5", "test MSE"
    )
    plots.save(figure, book.path(".png"))
    book.write()


def figure_adaptive(book: Book) -> None:
    """Draw the adaptive rank and epochs (Fig. 2B), with sums as the reference has them and with means."""
    fit, start = seeded(2, "2", 0)
    figure, axes = plots.panels(1, 3)
    part = "n=2, 2"
    points = fit.y.shape[1]
    adaptive = {}
    for label, sums in (("adaptive, sums (reference)", points), ("adaptive, means", 1)):
        settings = Settings("fipa", epochs=200, rounds=40, adaptive=True, sums=sums)
        adaptive[label] = book.curve(part, label, fit, start, settings)
    book.curve(part, "r=20, E=200", fit, start, Settings("fipa", epochs=200, rounds=40, rank=20))
    plots.errors(axes[0][0], book.results[part], "rounds", "sin(2πx), 2 clients", "test MSE")
    shown = adaptive["adaptive, sums (reference)"]
    rounds = list(range(1, len(shown.ranks) + 1))
    plots.steps(axes[0][1], rounds, shown.steps, "adaptive local epochs τ")
    plots.steps(axes[0][2], rounds, shown.ranks, "adaptive rank r")
    plots.save(figure, book.path(".png"))
    book.write()


def figure_2d(book: Book) -> None:
    """Draw the Gaussian mixture on 3 x 3 clients: test MSE and error maps (Fig. 2D-F)."""
    fit = two_dimensional(0)
    start = fit.network.initial(generator("network", 0))
    part = "3x3 clients"
    settings = Settings("fipa", epochs=EPOCHS, rounds=40, rank=20)
    curves = fipa_and_controls(book, part, fit, start, settings)
    figure, axes = plots.panels(1, 4)
    plots.errors(axes[0][0], book.results[part], "seconds", "Gaussian mixture", "test MSE")
    side = int(len(fit.test_y) ** 0.5)
    maps = {"target": fit.test_y, "FIPA, |error|": (fit.predict(curves["FIPA"].theta) - fit.test_y).abs()}
    average = curves["long"].theta
    maps["FedAvg E=1000, |error|"] = (fit.predict(average) - fit.test_y).abs()
    for place, (title, values) in zip(axes[0][1:], maps.items(), strict=True):
        plots.image(figure, place, values.view(side, side).T[::2, ::2], title, 3)
    plots.save(figure, book.path(".png"))
    book.write({"table": {part: summary(curves)}})


FIGURES = {
    Figure.one: figure_1d,
    Figure.variants: figure_variants,
    Figure.eight: figure_eight,
    Figure.newton: figure_newton,
    Figure.adaptive: figure_adaptive,
    Figure.two: figure_2d,
}


def main(
    figure: Annotated[Figure, typer.Option(help="Which figure; see the descriptions above.")],
    out: Annotated[Path, typer.Option(help="Folder for FIGURE.json and FIGURE.png.")] = Path(
        "build/experiments/fipa"
    ),
    scale: Annotated[
        float, typer.Option(min=0.001, help="Factor on the rounds: 0.05 looks at a figure within seconds.")
    ] = 1.0,
) -> None:
    """Run one figure of FIPA's function fitting and write its curves (JSON) and picture (PNG).

    1d: sin(n pi x), 2 and 4 clients with even and uneven cuts, FedAvg beside it (about 6 minutes).
    1d-variants: rank, server step, cut-off of the pseudo-inverse, local epochs. 1d-eight: eight clients, n = 8.
    gauss-newton: FIPA over rounds beside centralised Gauss-Newton. adaptive: the adaptive rank and epochs.
    2d: the Gaussian mixture on 3 x 3 clients. All on one thread in float64.
    """
    FIGURES[figure](Book(figure.value, out, scale))


if __name__ == "__main__":
    typer.run(main)
