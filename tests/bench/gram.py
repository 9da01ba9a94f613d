"""FIPA's server step from a file: its time against that of only forming V Vᵀ, and its peak memory.

    .venv/bin/python -m tests.bench.gram [--scale 0.1] [--folder FOLDER] [--repeats 3]

Eight sites send 20 float32 directions of 1e7 parameters each (6.4 GB, written to a temporary file without a name in
FOLDER). Measured are, each in a process of its own forked after the file was written, in turn and on the same blocks:

    floor          V Vᵀ by BLAS, summed in float64, and nothing else: reading, conversion and syrk
    step           G, the solution and Vᵀ c: the whole step of the paper
    step+fallback  the same with a fallback: V x in the first pass, and x in the second

Targets at scale 1: a step takes at most twice the floor, and at most 1 GB beside what the process held before it.
One thread computes. Ratios are of the floor of the same turn, since other work on the machine moves both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from common.numerics.gram import combine, gram, solve
from common.numerics.rng import generator
from common.sketches import SketchFile
from tests.bench.environment import write

PARAMETERS, RANK, SITES = 10_000_000, 20, 8
MOST_RATIO, MOST_MEMORY = 2.0, 1e9
THREADS = 1  # of BLAS and torch: their pools of more threads do not live on in a forked process
MEASURES = ("floor", "step", "step+fallback")
SHARE = 0.5  # of the mean update outside the sketches, where the fallback is on


def make_sketches(size: int) -> SketchFile:
    """Write the sites' sketches: random directions, which at this length are nearly orthonormal."""
    sketches = SketchFile()
    for site in range(SITES):
        random = generator("bench.gram", site)
        sketches.put(f"site-{site}", torch.randn(RANK, size, generator=random).mul_(size**-0.5))
    return sketches


class Watch:
    """Wall time and processor time since the start, peak memory of this process since the watch was made."""

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.start()

    def start(self) -> None:
        """Set the clocks, not the memory, to now."""
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return what was used until now; the peak is that of the whole process, above what it held at the start."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before
        return {
            "seconds": round(wall, 4), "cpu_s": round(cpu, 4), "peak_mb": round(peak / 1e6, 1),
            "before_mb": round(self.before / 1e6, 1),
        }  # fmt: skip


def floor(sketches: SketchFile, watch: Watch) -> dict[str, float]:
    """Form V Vᵀ and nothing else."""
    watch.start()
    total = np.zeros((SITES * RANK, SITES * RANK))
    for _, block in sketches.blocks()():
        array = block.numpy()
        total += array @ array.T
    return watch.read() | {"trace": float(np.trace(total))}


def step(sketches: SketchFile, watch: Watch, size: int, *, fallback: bool) -> dict[str, float]:
    """Do the whole step and time its parts; the update (p,) and the mean stay in memory, as in a round."""
    rows = SITES * RANK
    sigma = torch.logspace(0, -3, RANK, dtype=torch.float64).repeat(SITES) / SITES
    a = torch.randn(rows, generator=generator("bench.gram.a"), dtype=torch.float64)
    mean = (
        torch.randn(size, generator=generator("bench.gram.mean"), dtype=torch.float64) if fallback else None
    )
    watch.start()  # the mean's memory counts, not its making
    blocks = sketches.blocks()
    G, along = gram(blocks, None if mean is None else lambda where: mean[where])
    summed = time.perf_counter()
    c = solve(G, sigma, a - SHARE * along, beta=0.01)
    update = torch.empty(size, dtype=torch.float64) if mean is None else mean * SHARE
    solved = time.perf_counter()
    for where, part in combine(blocks, c):
        if mean is None:
            update[where] = part
        else:
            update[where] += part
    figures = watch.read() | {"trace": float(G.trace())}
    figures["gram_s"] = round(summed - watch.wall, 4)
    figures["solve_s"] = round(solved - summed, 4)
    figures["combine_s"] = round(figures["seconds"] - (solved - watch.wall), 4)
    if mean is None:
        figures["residual"] = residual(sketches, update, sigma, a)
    return figures


def residual(sketches: SketchFile, update: Tensor, sigma: Tensor, a: Tensor, beta: float = 0.01) -> float:
    """Return ‖(H + βI) Δθ − b‖ / ‖b‖, so that what was timed is known to be the solution."""
    blocks = sketches.blocks()
    along = gram(blocks, lambda where: update[where])[1]
    difference = squares = 0.0
    for where, part in combine(blocks, sigma * (along - a)):
        difference += float((part + beta * update[where]).square().sum())
    for _, part in combine(blocks, sigma * a):
        squares += float(part.square().sum())
    return (difference / squares) ** 0.5


def child(sketches: SketchFile, size: int, measure: str, answer: Connection) -> None:
    """Measure one thing in this process and send its figures."""
    watch = Watch()
    if measure == "floor":
        answer.send(floor(sketches, watch))
    else:
        answer.send(step(sketches, watch, size, fallback=measure == "step+fallback"))


def in_child(sketches: SketchFile, size: int, measure: str) -> dict[str, float]:
    """Run one measure in a forked process, which shares the open file and nothing that it writes."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(sketches, size, measure, theirs)
    )
    process.start()
    theirs.close()
    try:
        figures: dict[str, float] = ours.recv()
    except EOFError:
        raise SystemExit(f"the process that measured '{measure}' ended without figures") from None
    process.join()
    return figures


def run(scale: float, repeats: int) -> dict[str, Any]:
    """Write the input, measure in turn and sum up."""
    size = max(1, round(PARAMETERS * scale))
    began = time.perf_counter()
    with make_sketches(size) as sketches:
        written = time.perf_counter() - began
        turns = [{measure: in_child(sketches, size, measure) for measure in MEASURES} for _ in range(repeats)]
    for turn in turns:
        for measure, figures in turn.items():
            if abs(figures["trace"] - turn["floor"]["trace"]) > 1e-9 * turn["floor"]["trace"]:
                raise SystemExit(f"'{measure}' read other values than the floor did")
            figures["ratio"] = round(figures["seconds"] / turn["floor"]["seconds"], 3)
            figures["cpu_ratio"] = round(figures["cpu_s"] / turn["floor"]["cpu_s"], 3)
    summary: dict[str, Any] = {}
    for measure in MEASURES:
        column = [turn[measure] for turn in turns]
        summary[measure] = {
            "seconds": round(statistics.median(one["seconds"] for one in column), 3),
            "ratio": statistics.median(one["ratio"] for one in column),
            "cpu_ratio": statistics.median(one["cpu_ratio"] for one in column),
            "worst_ratio": max(one["ratio"] for one in column),
            "peak_mb": max(one["peak_mb"] for one in column),
        }
    return {
        "parameters": size, "rank": RANK, "sites": SITES, "bytes": 4 * SITES * RANK * size,
        "threads": THREADS, "write_s": round(written, 1), "summary": summary, "turns": turns,
        "within_target": all(
            row["ratio"] <= MOST_RATIO and row["peak_mb"] * 1e6 <= MOST_MEMORY for row in summary.values()
        ),
        "load_average": os.getloadavg(),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Measure and write build/bench/gram.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of 1e7 parameters")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the input is written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.inner:
        need, free = 4e7 * RANK * SITES * arguments.scale, shutil.disk_usage(arguments.folder).free
        if need * 1.1 > free:
            raise SystemExit(
                f"the input needs {need * 1.1 / 1e9:.1f} GB in {arguments.folder}, free are {free / 1e9:.1f}. "
                "Give another --folder or a smaller --scale."
            )
        # BLAS and OpenMP read their number of threads when they are loaded
        threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        again = [sys.executable, "-m", "tests.bench.gram", *argv, "--inner"]
        subprocess.run(again, env=os.environ | threads, check=True)
        return
    tempfile.tempdir = arguments.folder
    figures = {"scale": arguments.scale, **run(arguments.scale, arguments.repeats)}
    for measure, row in figures["summary"].items():
        ratios = f"{row['ratio']:5.3f} x  {row['cpu_ratio']:5.3f} x cpu"
        print(f"{measure:14} {row['seconds']:9.3f} s  {ratios}  {row['peak_mb']:7.1f} MB")
    print(write("gram" if arguments.scale == 1 else f"gram-{arguments.scale:g}", figures))


if __name__ == "__main__":
    main(sys.argv[1:])
