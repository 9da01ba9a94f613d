"""Does the worker's memory stay flat? Fifty rounds, resident memory after each, the slope with its standard error.

.venv/bin/python -m tests.bench.memory [--rounds 50]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

from common.events import read_events
from ops.options import Options
from ops.trial import run_trial
from tests.bench.environment import tiny_data, write

WARM = 5


def main(argv: list[str]) -> None:
    """Measure and write build/bench/memory.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args(argv).rounds
    folder = Path(tempfile.mkdtemp(prefix="wr-bench-"))
    options = Options(
        "ditto", str(tiny_data(folder / "tiny")), rounds=rounds, out=folder / "run",
        settings=("width=8", "levels=2", "patch=16,16,16"),
    )  # fmt: skip
    if code := run_trial(options):
        raise SystemExit(code)
    figures = {}
    for site in ("hospital-1", "hospital-2", "hospital-3"):
        events = read_events(folder / "run" / f"events-{site}.jsonl")
        points = [
            (event["round"], event["rss"])
            for event in events
            if event["event"] == "memory" and WARM < event["round"] <= rounds
        ]
        x, y = np.array(points).T
        fit = stats.linregress(x, y)
        figures[site] = {
            "rounds": len(x), "first_mb": round(float(y[0]), 1), "last_mb": round(float(y[-1]), 1),
            "slope_mb_per_round": round(float(fit.slope), 4), "standard_error": round(float(fit.stderr), 4),
            "noise_mb": round(float(np.std(y - fit.intercept - fit.slope * x)), 3),
        }  # fmt: skip
    print(write("memory", figures))


if __name__ == "__main__":
    main(sys.argv[1:])
