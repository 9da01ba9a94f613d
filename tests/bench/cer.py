"""CER's exact solver beside one iteration of its ADMM: seconds of one core, and memory, over data and weights.

    .venv/bin/python -m tests.bench.cer [--values 10000000] [--repeats 5]

Times are CPU seconds of this process (one thread), so other work on the machine counts only by what it takes from the
caches; minimum and median of the repeats are written. Every call allocates its result anew, as a user's call does; fresh
pages can cost several times the work, so ratios are of the minima. An ADMM iteration is that of the paper with the
threshold put right: a tridiagonal solve (scipy.linalg.solveh_banded; beside it LAPACK's with the factor kept), Λ, its
adjoint, the threshold and the dual, without the norms that stop it. Compilation is measured once and left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from scipy.linalg.lapack import dpttrf, dpttrs

from common.numerics.total_variation import cer_update, differences, from_runs, peak_of_sums, runs
from tests.bench.environment import write

Values = NDArray[Any]


def data(size: int) -> dict[str, Values]:
    """Return kinds of updates: of no structure, with heavy tails, smooth, and two that leave much undecided for long."""
    rng = np.random.default_rng(0)
    noise, place = rng.normal(size=size), np.arange(size)
    return {
        "noise": noise,
        "heavy tails": noise**5,
        "smooth and noise": np.sin(place / 1000) + 0.1 * noise,
        "ramp": (place - size / 2) / size,
        "growing spikes": np.where(place % 10, 0.0, place / size),
    }


def seconds(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the CPU seconds of a call."""
    took = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        took.append(time.process_time() - begun)
    return {"min": round(min(took), 4), "median": round(statistics.median(took), 4)}


def admm_iteration(g: Values, gamma: float, *, kept: bool) -> Callable[[], object]:
    """Return one iteration of ADMM (ρ = 1) as a call, from a state in the middle of a solution."""
    r, w = 0.1 * g, 0.05 * g
    bands = np.full((2, g.size), -1.0)
    bands[1] = 3.0
    bands[1, 0] = 2.0
    factor = dpttrf(bands[1], bands[0, 1:])[:2] if kept else None

    def iterate() -> object:
        right = r - w
        right[1:] -= (r - w)[:-1]
        right += g
        u = (
            dpttrs(*factor, right)[0]
            if factor is not None
            else solveh_banded(bands, right, check_finite=False)
        )
        target = differences(u)
        dual = w + target
        threshold = dual - np.clip(dual, -gamma, gamma)
        dual -= threshold
        return u, threshold, dual

    return iterate


def peak_memory(call: Callable[[], object]) -> float:
    """Return by how many MB a call raised the memory of this process, looked at every millisecond."""
    process, stop, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    stop.set()
    watcher.join()
    return round(peak / 2**20, 1)


def measure(g: Values, gamma: float, repeats: int) -> dict[str, Any]:
    """Return the figures of one vector and weight."""
    took = seconds(lambda: cer_update(g, gamma), repeats)
    u = cer_update(g, gamma)
    starts, levels = runs(u)
    if not np.array_equal(from_runs(starts, levels, u.size), u):
        raise SystemExit("runs and back is not exact")
    return {
        "values": g.size,
        "dtype": str(g.dtype),
        "gamma": gamma,
        "share_of_peak": round(gamma / peak_of_sums(g), 6),
        "runs": len(starts),
        "cpu_s": took,
        "million_values_per_s": round(g.size / took["median"] / 1e6, 1),
    }


def main(argv: list[str]) -> None:
    """Measure and write build/bench/cer.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    begun = time.process_time()
    cer_update(np.array([1.0, 2.0]), 0.5)
    figures: dict[str, Any] = {
        "values": arguments.values,
        "compile_cpu_s": round(time.process_time() - begun, 2),
        "exact": {},
    }
    kinds = data(arguments.values)
    for name, g in kinds.items():
        scale = float(np.std(g)) if name in ("noise", "heavy tails") else peak_of_sums(g)
        weights = (0.1, 1.0, 10.0, 100.0) if name in ("noise", "heavy tails") else (1e-6, 1e-3, 0.1)
        figures["exact"][name] = [measure(g, weight * scale, arguments.repeats) for weight in weights]
    noise = kinds["noise"]
    figures["exact"]["noise as float32"] = [measure(noise.astype(np.float32), 1.0, arguments.repeats)]
    figures["exact"]["a tenth of the noise"] = [
        measure(noise[: arguments.values // 10], 1.0, arguments.repeats)
    ]
    figures["admm_iteration_cpu_s"] = {
        "solveh_banded": seconds(admm_iteration(noise, 1.0, kept=False), arguments.repeats),
        "factor kept": seconds(admm_iteration(noise, 1.0, kept=True), arguments.repeats),
    }
    figures["peak_mb"] = {
        "one copy of the values": round(noise.nbytes / 2**20, 1),
        "exact": peak_memory(lambda: cer_update(noise, 1.0)),
        "admm iteration": peak_memory(admm_iteration(noise, 1.0, kept=True)),
    }
    one = figures["admm_iteration_cpu_s"]["solveh_banded"]["min"]
    for row in (row for rows in figures["exact"].values() for row in rows):
        # its own length against an iteration over all values: only rows of that length are compared
        row["over_admm_iteration"] = (
            round(row["cpu_s"]["min"] / one, 3) if row["values"] == noise.size else None
        )
    figures["load_average"] = os.getloadavg()
    print(write("cer", figures))


if __name__ == "__main__":
    main(sys.argv[1:])
