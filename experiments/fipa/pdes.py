"""The paper's figures of differential equations (its Fig. 3), run again.

Run one figure: `python -m experiments.fipa.pdes --figure 1d-equations --out build/experiments/fipa`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from common.numerics.rng import generator
from experiments.fipa import plots
from experiments.fipa.record import Book
from experiments.fipa.residuals import EQUATIONS, Pinn, poisson, two_strips
from experiments.fipa.rounds import Curve, Settings

SEED = 0
# Interior points per client, lambda; as in the reference.
LINE = {
    "allen-cahn": (400, 10.0),
    "bratu": (400, 10.0),
    "fisher": (400, 10.0),
    "reaction-diffusion": (800, 100.0),
}


class Figure(StrEnum):
    """The figures of this script."""

    line = "1d-equations"
    poisson = "poisson"
    scaling = "row-scaling"


class Case:
    """One Poisson problem: points, lambda, FIPA's settings. The reference's points in the comment at `POISSON`."""

    def __init__(
        self, interior: int, face: int, penalty: float, rank: int, epochs: int, rounds: int, gamma: float
    ) -> None:
        self.interior, self.face, self.penalty = interior, face, penalty
        self.settings = Settings("fipa", epochs=epochs, rounds=rounds, rank=rank, gamma=gamma)


# Rank and lambda are the reference's. It has 2000/200, 4000/400 and 4000/1000 points (interior/face) for d = 2, 3, 5,
# 300 epochs and a server step of 0.3 or 0.5: with one thread of a processor, minutes leave room for few rounds, so
# there are fewer points and epochs here and the paper's step 1.
POISSON = {
    1: Case(400, 20, 10.0, 20, 100, 30, 0.3),
    2: Case(400, 40, 100.0, 50, 200, 12, 1.0),
    3: Case(500, 50, 100.0, 200, 200, 8, 1.0),
    5: Case(500, 50, 100.0, 200, 200, 8, 1.0),
}


def start_of(problem: Pinn) -> torch.Tensor:
    """Return the start that all methods of a figure share."""
    return problem.network.initial(generator("network", SEED))


def with_control(book: Book, part: str, problem: Pinn, settings: Settings) -> dict[str, float]:
    """Run FIPA, and FedAvg until it has had FIPA's rounds and FIPA's seconds; return the errors side by side."""
    start = start_of(problem)
    fipa = book.curve(part, f"FIPA r={settings.rank}, γ={settings.gamma:g}", problem, start, settings)
    rounds, seconds = len(fipa.errors) - 1, fipa.seconds[-1]
    control = Settings("fedavg", epochs=settings.epochs, rounds=10 * rounds, seconds=seconds)
    fedavg = book.curve(part, f"FedAvg E={settings.epochs}", problem, start, control)
    return {
        "FIPA final": fipa.errors[-1],
        "FIPA best": min(fipa.errors),
        "FedAvg at equal local work": fedavg.errors[min(rounds, len(fedavg.errors) - 1)],
        "FedAvg at equal seconds": fedavg.errors[-1],
        "FedAvg best": min(fedavg.errors),
        "rounds": rounds,
        "seconds": round(seconds, 1),
    }


def figure_line(book: Book) -> None:
    """Draw the four equations on an interval (Fig. 3A, B), each also with the paper's server step 1."""
    figure, axes = plots.panels(2, len(LINE))
    grid = torch.linspace(0, 1, 1024, dtype=torch.float64)[::8].tolist()
    table, fitted = {}, {}
    for column, (name, (interior, penalty)) in enumerate(LINE.items()):
        problem = two_strips(EQUATIONS[name], interior, 20, penalty, SEED)
        settings = Settings("fipa", epochs=100, rounds=30, rank=20, gamma=0.3)
        table[name] = with_control(book, name, problem, settings)
        paper = Settings("fipa", epochs=100, rounds=30, rank=20, gamma=1.0)
        one = book.curve(name, "FIPA r=20, γ=1", problem, start_of(problem), paper)
        table[name]["FIPA γ=1 final"] = one.errors[-1]
        plots.errors(axes[0][column], book.results[name], "seconds", name, "relative L2 error")
        fitted[name] = solutions(book, name, problem, one)
        plots.functions(axes[1][column], grid, fitted[name], "solution")
    plots.save(figure, book.path(".png"))
    book.write({"table": table, "fitted": fitted})


def solutions(book: Book, name: str, problem: Pinn, one: Curve) -> dict[str, list[float]]:
    """Return the exact solution, FIPA's and FedAvg's, thinned."""
    found = {"truth": problem.truth, "FIPA, γ=1": problem.predict(one.theta)}
    found["FedAvg"] = problem.predict(book.last[name, "FedAvg E=100"].theta)
    return {label: [round(value, 4) for value in values[::8].tolist()] for label, values in found.items()}


def figure_poisson(book: Book) -> None:
    """Draw Poisson for d = 1, 2, 3, 5 with the printed product and the coded sum (they agree for d = 1)."""
    figure, axes = plots.panels(2, len(POISSON))
    table = {}
    for column, (d, case) in enumerate(POISSON.items()):
        for row, target in enumerate(("product", "sum")):
            if d == 1 and row:
                axes[row][column].axis("off")
                continue
            part = f"d={d}, {target}"
            problem = two_strips(poisson(d, target), case.interior, case.face, case.penalty, SEED)
            table[part] = with_control(book, part, problem, case.settings)
            plots.errors(
                axes[row][column], book.results[part], "seconds", f"Poisson {part}", "relative L2 error"
            )
    plots.save(figure, book.path(".png"))
    book.write({"table": table})


def figure_scaling(book: Book) -> None:
    """Draw what the reference's sums in H do beside H of the trained loss: the boundary counts N_int/N_bc less."""
    figure, axes = plots.panels(1, 1, width=4.8, height=3.8)
    name = "allen-cahn"
    for label, sums in (("H of the trained loss", False), ("H from sums (reference)", True)):
        problem = two_strips(EQUATIONS[name], 400, 20, 10.0, SEED, sums=sums)
        settings = Settings("fipa", epochs=100, rounds=30, rank=20, gamma=0.3)
        book.curve(name, label, problem, start_of(problem), settings)
    plots.errors(axes[0][0], book.results[name], "rounds", name, "relative L2 error")
    plots.save(figure, book.path(".png"))
    book.write()


FIGURES = {Figure.line: figure_line, Figure.poisson: figure_poisson, Figure.scaling: figure_scaling}


def main(
    figure: Annotated[Figure, typer.Option(help="Which figure; see the descriptions above.")],
    out: Annotated[Path, typer.Option(help="Folder for pde-FIGURE.json and pde-FIGURE.png.")] = Path(
        "build/experiments/fipa"
    ),
    scale: Annotated[
        float, typer.Option(min=0.001, help="Factor on the rounds: 0.05 looks at a figure within seconds.")
    ] = 1.0,
) -> None:
    """Run one figure of FIPA's differential equations and write its curves (JSON) and picture (PNG).

    1d-equations: Allen-Cahn, Bratu, Fisher and reaction-diffusion on two clients (about 4 minutes).
    poisson: d = 1, 2, 3, 5, with the product that the paper prints and the sum that its code solves.
    row-scaling: H of the trained loss beside the reference's sums. All on one thread in float64.
    """
    FIGURES[figure](Book(f"pde-{figure.value}", out, scale))


if __name__ == "__main__":
    typer.run(main)
