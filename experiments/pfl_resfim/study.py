"""pFL-ResFIM against its baselines on the retinal vessels (2D) and the default brain trial (3D), and a sweep.

    .venv/bin/python -m experiments.pfl_resfim.study sweep --vessels vessels --brain data/mni152-3x10-seed0
    .venv/bin/python -m experiments.pfl_resfim.study methods --vessels vessels --brain data/mni152-3x10-seed0
    .venv/bin/python -m experiments.pfl_resfim.tables

`vessels` is what `wardround data import vessels` wrote, `data/mni152-...` what the first `wardround trial` did. `sweep` changes
one parameter at a time and is read on validation cases alone; `methods` runs everything at the defaults with three seeds.
Every method has the same network, rounds, epochs and optimiser. Results: one JSON file per run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.lab import Job, run_jobs

RESULTS = Path("build") / "experiments" / "pfl_resfim"
SEEDS = (0, 1, 2)
ROUNDS = {"vessels": 10, "brain": 8}
SWEEP_ROUNDS = {"vessels": 8, "brain": 8}

# What a table calls it, the registered method, and its settings.
METHODS = {
    "FedAvg": ("fedavg", ()),
    "FedProx": ("fedprox", ()),
    "FedBN": ("fedbn", ()),
    "FedPer": ("fedbn", ("keep=head,buffers",)),
    "Ditto": ("ditto", ()),
    "local only": ("local-only", ()),
    "pFL-ResFIM": ("pfl-resfim", ()),
}

RANDOM = "random masks"  # random_masks.py; a row of the tables, not a method that a run can name

# One parameter at a time; the first of each is the value the sweep stands on.
BASE = {"rho": "0.2", "beta": "0.01", "residual": "absolute", "normalise": "tensor", "reference": "real"}
SWEEP = {
    "rho": ("0.05", "0.1", "0.2", "0.4", "0.7"),
    "beta": ("0", "0.01", "0.05", "0.15"),
    "residual": ("absolute", "signed", "relative"),
    "normalise": ("tensor", "global"),
    "reference": ("real", "own"),
}


def method_jobs(task: str, data: Path, methods: list[str]) -> list[Job]:
    """Return the runs of the comparison on one task, all methods of a seed together."""
    return [
        Job(
            f"{task}-{label.replace(' ', '-').lower()}-s{seed}", data, METHODS[label][0], ROUNDS[task], seed,
            METHODS[label][1], {"task": task, "method": label},
        )
        for seed in SEEDS
        for label in methods
    ]  # fmt: skip


def sweep_jobs(task: str, data: Path, seeds: tuple[int, ...]) -> list[Job]:
    """Return the runs of the sweep on one task; the point all lines share is run once."""
    jobs: dict[str, Job] = {}
    for seed in seeds:
        for name, values in SWEEP.items():
            for value in values:
                point = BASE | {name: value}
                settings = tuple(f"{key}={setting}" for key, setting in point.items())
                where = "base" if value == BASE[name] else f"{name}-{value}"
                job = f"sweep-{task}-{where}-s{seed}"
                jobs[job] = Job(
                    job, data, "pfl-resfim", SWEEP_ROUNDS[task], seed, settings, {"task": task, **point}
                )
    return list(jobs.values())


def main(argv: list[str]) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("methods", "sweep"))
    parser.add_argument("--vessels", type=Path, help="data root of the vessels")
    parser.add_argument("--brain", type=Path, help="data root of the default trial")
    parser.add_argument("--methods", default=",".join(METHODS), help="labels of the tables, with commas")
    parser.add_argument("--seeds", default="0", help="of the sweep")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes, one core each; 0: as many as cores"
    )
    options = parser.parse_args(argv)
    roots = {"brain": options.brain, "vessels": options.vessels}
    jobs: list[Job] = []
    for task, root in roots.items():
        if root is None:
            continue
        if options.what == "methods":
            jobs += method_jobs(task, root, options.methods.split(","))
        else:
            jobs += sweep_jobs(task, root, tuple(int(seed) for seed in options.seeds.split(",")))
    run_jobs(jobs, options.out, workers=options.workers)


if __name__ == "__main__":
    main(sys.argv[1:])
