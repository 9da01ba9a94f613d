"""Does anything grow? Hundreds of rounds with three sites; every process and every kind of file is measured throughout.

    python -m tests.faults.soak [--rounds 300]

Measured every two seconds from outside: resident memory, open files, threads and children of every process, sizes and
counts of the run folder's files. Each quantity gets a line fitted over the last 80 % of the rounds, through the means
of blocks of rounds (samples next to each other are not independent), and a verdict by its slope and two standard
errors: "grows" if it surely gains more than its limit in a thousand rounds, "unclear: more rounds" if it might, "grows
within its limit" if it surely gains, but less than that, else "flat". Event files, ledgers and logs grow by their
lines; their bytes per round are said.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from scipy import stats

from tests.bench.environment import tiny_data, write
from tests.faults.tools import Run

EVERY_SECONDS = 2.0
BLOCKS = 24
LATER = 0.2  # the share of the rounds that warms up
SETTINGS = ("width=4", "levels=2", "patch=16,16,16", "patches_per_case=1", "hd95=never")
LIMITS = {"rss_mb": 32.0, "fds": 1.0, "threads": 1.0, "children": 1.0, "count": 1.0, "bytes": 1e6}
"""What a quantity may gain in a thousand rounds before it counts as growing."""

LINES = ("events", "logs", "ledger")  # files that get a line for what happens, and so must grow


def processes(run):
    """Return the run's living processes by name, the ServerApp and the command among them."""
    names = {}
    for item in run.named("process.start", "events-trial.jsonl"):
        found = run.process(item["name"])
        if found is not None:
            names[item["name"]] = found
    app = run.server_app()
    if app is not None:
        names["serverapp (the app)"] = app
    names["command"] = psutil.Process(run.command.pid)
    return names


def look(run):
    """Return every quantity now, as {(what, quantity): value}."""
    seen = {}
    for name, process in processes(run).items():
        try:
            with process.oneshot():
                seen[name, "rss_mb"] = process.memory_info().rss / 2**20
                seen[name, "fds"] = process.num_fds()
                seen[name, "threads"] = process.num_threads()
            if not name.startswith("relay-"):  # a launcher's children come and go with the messages
                seen[name, "children"] = len(process.children())
        except psutil.Error:
            continue
    for kind, (count, size) in files(run.out).items():
        seen[f"files: {kind}", "count"] = count
        seen[f"files: {kind}", "bytes"] = size
    return seen


def files(out):
    """Return (count, bytes) by kind of file."""
    kinds = {}
    for folder, _, names in os.walk(out):
        for name in names:
            path = Path(folder) / name
            try:
                size = path.stat().st_size
            except OSError:
                continue  # replaced meanwhile
            kind = kind_of(path.relative_to(out))
            count, total = kinds.get(kind, (0, 0))
            kinds[kind] = (count + 1, total + size)
    return kinds


def kind_of(path):
    """Return which kind of file a path of the run folder is."""
    if path.name.startswith("events"):
        return f"events {path.name}"
    if "ledger" in path.name or "ledger" in path.parts:
        return "ledger"
    if path.parts[0] == "sites":
        return "sites/state" if "state" in path.parts else "sites"
    return path.parts[0] if len(path.parts) > 1 else "run folder"


def watch(run, rounds):
    """Sample until the command ends; returns [(moment, quantities)] and its exit code."""
    samples = []
    run.until(lambda: run.begun(1), "round 1 begins")
    while run.command.poll() is None:
        if not any(item.get("closing") for item in run.named("round.start")):
            samples.append((time.time(), look(run)))
        time.sleep(EVERY_SECONDS)
    return samples, run.command.returncode


def slope(x, y):
    """Return (slope, standard error) of a line through the means of blocks of rounds."""
    if np.ptp(y) == 0:
        return 0.0, 0.0
    edges = np.linspace(x.min(), x.max(), BLOCKS + 1)
    block = np.clip(np.digitize(x, edges) - 1, 0, BLOCKS - 1)
    used = [number for number in range(BLOCKS) if (block == number).any()]
    means = [(x[block == number].mean(), y[block == number].mean()) for number in used]
    if len(means) < 3:
        raise SystemExit("too few samples for a slope: ask for more rounds")
    fit = stats.linregress(*np.array(means).T)
    return float(fit.slope), float(fit.stderr)


def verdict(what, quantity, rise, error):
    """Say whether a quantity grows."""
    limit = LIMITS[quantity] / 1000
    kind = what.removeprefix("files: ").split(" ")[0]
    if quantity == "bytes" and kind in LINES:
        return "grows by its lines"
    if rise + 2 * error <= limit:
        return "grows within its limit" if rise - 2 * error > 0 else "flat"
    return "grows" if rise - 2 * error > limit else "unclear: more rounds"


def evaluate(samples, ends):
    """Return the figures of every quantity that was there throughout."""
    moments, numbers = np.array(sorted((item["t"], item["round"]) for item in ends)).T
    when = np.interp([moment for moment, _ in samples], moments, numbers)
    first = numbers.max() * LATER
    keys = sorted({key for _, seen in samples for key in seen})
    figures = {}
    for key in keys:
        points = [
            (at, seen[key])
            for at, (_, seen) in zip(when, samples, strict=True)
            if key in seen and at >= first
        ]
        if len(points) < 0.5 * (when >= first).sum():
            continue  # not there most of the time
        x, y = np.array(points).T
        rise, error = slope(x, y)
        figures.setdefault(key[0], {})[key[1]] = {
            "first": round(float(y[0]), 2), "last": round(float(y[-1]), 2), "most": round(float(y.max()), 2),
            "per_round": round(rise, 5), "standard_error": round(error, 5), "verdict": verdict(*key, rise, error),
        }  # fmt: skip
    return figures


def main(argv):
    """Run, measure, write build/bench/soak.json; ends with 1 if something grows that must not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--method", default="ditto")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="wr-soak-"))
    data = tiny_data(folder / "tiny")
    with Run(folder / "soak" / "run") as run:
        run.start(
            {"method": arguments.method, "data": str(data), "rounds": arguments.rounds, "settings": SETTINGS}
        )
        samples, code = watch(run, arguments.rounds)
        if code:
            raise SystemExit(
                f"the trial failed with code {code}; its folder is {run.out}\n{run.last_words()}"
            )
        ends = [item for item in run.named("round.end") if not item["closing"]]
        seconds = np.array([item["seconds"] for item in ends])
        rise, error = slope(
            np.arange(len(ends), dtype=float)[int(len(ends) * LATER) :], seconds[int(len(ends) * LATER) :]
        )
        figures = {
            "rounds": len(ends), "samples": len(samples), "restarts": len(run.told("process.restart")),
            "retries": len(run.named("site.retry")), "seconds_per_round": {
                "median": round(float(np.median(seconds)), 3), "slope": round(rise, 6), "standard_error": round(error, 6),
            },
            "quantities": evaluate(samples, ends),
        }  # fmt: skip
    print(write("soak", figures))
    said = [
        (item["verdict"], f"{what}: {name} {item['verdict']} ({item['per_round']} ± {item['standard_error']} a round)")
        for what, kinds in figures["quantities"].items() for name, item in kinds.items()
    ]  # fmt: skip
    print(
        "\n".join(line for verdict_, line in said if verdict_ not in ("flat", "grows by its lines"))
        or "nothing grows"
    )
    return 1 if any(verdict_ == "grows" for verdict_, _ in said) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
