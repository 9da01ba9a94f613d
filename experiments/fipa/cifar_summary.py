"""Table, markdown and plot of the finished CIFAR-10 jobs of one folder."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "fedavg": "FedAvg",
    "fedavg_low": "FedAvg, rate / 10",
    "fedavg_damped": "FedAvg, server step 0.25",
    "fedavg_low_damped": "FedAvg, rate / 10, server step 0.25",
    "fipa": "FIPA, code form (gamma beta = 0.25)",
    "fipa_paper": "FIPA, printed form (gamma = 0.5)",
}


@dataclass(frozen=True)
class Row:
    """One arm of one model and concentration; percentages, (seeds,) each in the order of `seeds`.

    Attributes:
        seeds: Seeds that are finished.
        start: Accuracy at the checkpoint.
        most: Best accuracy of the rounds.
        mean: Mean accuracy of the rounds.
        course: Accuracy by round, (seeds, rounds).
        energy: Mean share of tr H in the sketches; NaN without FIPA.
        seconds: Mean wall-clock time of the arm.
    """

    model: str
    alpha: float
    arm: str
    seeds: tuple[int, ...]
    start: np.ndarray
    most: np.ndarray
    mean: np.ndarray
    course: np.ndarray
    energy: float
    seconds: float


def collect(out: Path) -> list[Row]:
    """Read the finished jobs of a folder, sorted by model, concentration and arm."""
    groups = defaultdict(list)
    for path in sorted(out.glob("cnn-*.json")):
        record = json.loads(path.read_text())
        if record["arm"] in LABELS:
            groups[(record["model"], record["alpha"], record["arm"])].append(record)
    rows = []
    order = list(LABELS)
    # cnn-8k comes before cnn-23k.
    for model, alpha, arm in sorted(groups, key=lambda k: (len(k[0]), k[0], k[1], order.index(k[2]))):
        records = sorted(groups[(model, alpha, arm)], key=lambda record: record["seed"])
        course = 100 * np.array([record["accuracy"] for record in records])
        energies = [one["energy"] for record in records for one in record["sketch"]]
        rows.append(
            Row(
                model,
                alpha,
                arm,
                tuple(record["seed"] for record in records),
                100 * np.array([record["start"] for record in records]),
                course.max(1),
                course.mean(1),
                course,
                float(np.mean(energies)) if energies else float("nan"),
                float(np.mean([record["seconds"] for record in records])),
            )
        )
    return rows


def spread(values: np.ndarray, sign: str = "") -> str:
    """Return "mean ± standard deviation" over the seeds (n - 1), or the single value."""
    text = f"{values.mean():{sign}.2f}"
    return f"{text} ± {values.std(ddof=1):.2f}" if len(values) > 1 else text


def paired_gain(rows: list[Row], fipa: Row, control: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (gain of max, gain of mean) of a FIPA row over a control, seed by seed, where both are finished."""
    for row in rows:
        if (row.model, row.alpha, row.arm) == (fipa.model, fipa.alpha, control):
            common = [seed for seed in fipa.seeds if seed in row.seeds]
            ours = [fipa.seeds.index(seed) for seed in common]
            theirs = [row.seeds.index(seed) for seed in common]
            if common:
                return fipa.most[ours] - row.most[theirs], fipa.mean[ours] - row.mean[theirs]
    return None


ACCURACY_HEAD = ("model", "alpha", "arm", "seeds", "checkpoint", "max of 15", "mean of 15", "tr H kept", "s")
GAIN_HEAD = ("model", "alpha", "FIPA form", "against", "seeds", "gain of max", "gain of mean")


def accuracy_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """Return the lines under `ACCURACY_HEAD`."""
    return [
        (
            row.model,
            f"{row.alpha:g}",
            LABELS[row.arm],
            str(len(row.seeds)),
            spread(row.start),
            spread(row.most),
            spread(row.mean),
            "" if np.isnan(row.energy) else f"{100 * row.energy:.1f} %",
            f"{row.seconds:.0f}",
        )
        for row in rows
    ]


def gain_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """Return the lines under `GAIN_HEAD`: FIPA minus each control, paired by seed."""
    lines: list[tuple[str, ...]] = []
    for fipa in (row for row in rows if row.arm.startswith("fipa")):
        for control in (arm for arm in LABELS if arm.startswith("fedavg")):
            gain = paired_gain(rows, fipa, control)
            if gain is not None:
                most, mean = gain
                form = "code" if fipa.arm == "fipa" else "printed"
                head = (fipa.model, f"{fipa.alpha:g}", form, LABELS[control], str(len(most)))
                lines.append((*head, spread(most, "+"), spread(mean, "+")))
    return lines


def markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Return a markdown table."""
    parts = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Draw test accuracy over the rounds, one panel for each model and concentration: seeds thin, their mean thick."""
    panels = list(dict.fromkeys((row.model, row.alpha) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    colours = {arm: f"C{i}" for i, arm in enumerate(LABELS)}
    for axis, (model, alpha) in zip(axes[0], panels, strict=True):
        for row in (row for row in rows if (row.model, row.alpha) == (model, alpha)):
            course = np.concatenate([row.start[:, None], row.course], 1)
            rounds = np.arange(course.shape[1])
            for one in course:
                axis.plot(rounds, one, color=colours[row.arm], lw=0.5, alpha=0.4)
            axis.plot(rounds, course.mean(0), color=colours[row.arm], lw=2, label=LABELS[row.arm])
        seeds = max(len(row.seeds) for row in rows if (row.model, row.alpha) == (model, alpha))
        axis.set(title=f"{model}, alpha {alpha:g}, {seeds} seed(s)", xlabel="round after the warm-up")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, % (CIFAR-10, JPEG copy)")
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes[0]), key=lambda pair: len(pair[0])
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def summarise(out: Path, console: Console) -> None:
    """Print the tables and write cifar.md and cifar.png into the folder."""
    rows = collect(out)
    if not rows:
        console.print("Nothing is finished yet.")
        return
    text = []
    for title, head, lines in (
        ("Test accuracy, %, CIFAR-10 (JPEG copy)", ACCURACY_HEAD, accuracy_lines(rows)),
        ("FIPA minus control, percentage points, paired by seed", GAIN_HEAD, gain_lines(rows)),
    ):
        table = Table(*head, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        text.append(f"**{title}** (mean ± standard deviation over the seeds)\n\n{markdown(head, lines)}")
    (out / "cifar.md").write_text("\n".join(text))
    plot(rows, out / "cifar.png")
