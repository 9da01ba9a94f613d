"""What every figure script shares: progress on the screen, results as JSON with the environment beside them."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import threadpool_limits
from torch import Tensor

from experiments.fipa.rounds import Curve, Problem, Settings, run

console = Console()


def environment() -> dict[str, Any]:
    """Return what the seconds of a figure depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float64",
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
    }


class Book:
    """Runs the curves of one figure with a progress bar and keeps them.

    Args:
        figure: Name, also of the files.
        out: Folder of the JSON and PNG files; made where missing.
        scale: Factor on all numbers of rounds, to look at a figure quickly (1 is the recorded one).
    """

    def __init__(self, figure: str, out: Path, scale: float = 1.0) -> None:
        torch.set_num_threads(1)
        threadpool_limits(1)  # the same for NumPy's and SciPy's BLAS; holds for the whole process
        self.figure, self.out, self.scale = figure, out, scale
        self.begun = (time.perf_counter(), time.process_time())
        self.results: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.last: dict[tuple[str, str], Curve] = {}
        out.mkdir(parents=True, exist_ok=True)

    def curve(self, part: str, label: str, problem: Problem, theta: Tensor, settings: Settings) -> Curve:
        """Run one method, show its rounds, keep the thinned curve under `part` and `label`."""
        rounds = max(2, round(settings.rounds * self.scale))
        settings = Settings(**{**settings.__dict__, "rounds": rounds})
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        name = f"{self.figure} · {part} · {label}"
        with Progress(*columns, TextColumn("{task.fields[error]}"), console=console, transient=True) as bar:
            task = bar.add_task(name, total=rounds, error="")
            found = run(
                problem,
                theta,
                settings,
                tick=lambda k, error: bar.update(task, completed=k, error=f"{error:.2e}"),
            )
        console.print(
            f"{name}: {len(found.errors) - 1} rounds, {found.seconds[-1]:.1f} s, "
            f"best {min(found.errors):.2e}, final {found.errors[-1]:.2e}",
            highlight=False,
        )
        self.results.setdefault(part, {}).setdefault(label, []).append(found.thinned())
        self.last[part, label] = found
        return found

    def path(self, suffix: str) -> Path:
        """Return the figure's file with this suffix."""
        return self.out / f"{self.figure}{suffix}"

    def write(self, extra: dict[str, Any] | None = None) -> Path:
        """Write the JSON file and say where it is."""
        path = self.path(".json")
        wall, processor = self.begun
        content = {
            "figure": self.figure,
            "environment": environment(),
            "wall_seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
            "curves": self.results,
            **(extra or {}),
        }
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
        console.print(f"[bold]{path}[/bold] and the picture beside it", highlight=False)
        return path
