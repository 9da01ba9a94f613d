"""pFedNet against its baselines on tables, pictures and volumes; λ and its network; and what CER buys on the wire.

    .venv/bin/python -m experiments.pfednet.study lam --heart heart --split-1 cifar-1 ... --hippocampus hip-int
    .venv/bin/python -m experiments.pfednet.study methods --heart heart --split-1 cifar-1 ... --hippocampus hip-int
    .venv/bin/python -m experiments.pfednet.study bytes --split-4 cifar-4 --hippocampus hip-int
    .venv/bin/python -m experiments.pfednet.tables

Data roots are what `wardround data import` wrote (README.md has the commands). `lam` is read on validation cases; `methods` and
`bytes` run at the defaults. Every method has the same network, rounds, epochs and optimiser. One JSON file per run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.lab import Job, run_jobs

RESULTS = Path("build") / "experiments" / "pfednet"
SEEDS = (0, 1, 2)
SPLITS = ("split-1", "split-2", "split-4", "split-7")
ROUNDS = {"heart": 20, "hippocampus": 6, **dict.fromkeys(SPLITS, 10)}
PICTURES = ("optimizer=adam", "lr=0.002", "batch_size=16")
HIPPOCAMPUS = ("patches_per_case=1", "batch_size=2", "lr=0.002", "width=8")

# What a table calls it, the registered method, and its settings.
METHODS = {
    "FedAvg": ("fedavg", ()),
    "FedPer": ("fedper", ()),
    "FedRep": ("fedrep", ()),
    "Ditto": ("ditto", ()),
    "local only": ("local-only", ()),
    "pFedNet": ("pfednet", ()),
}
NO_BASE = ("FedPer", "FedRep")  # a linear model is all head: they refuse the heart data
LAMS = ("0", "0.05", "0.1", "0.2", "0.4", "0.7", "1")
NETWORKS = {
    "knn, k=1": ("k=1",),
    "knn, k=2": ("k=2",),
    "gradient, k=2": ("k=2", "sketch=gradient", "metric=cosine"),
    "p=1": ("p=1",),
    "p=inf": ("p=inf", "groups=tensor"),
    "alternate": ("alternate=true",),
}
GAMMAS = ("0.001", "0.01")
CODECS = {
    "raw": (),
    "bf16": ("uplink-codec=bf16",),
    **{f"stc p={p}": ("uplink-codec=stc", f"uplink-p={p}") for p in ("0.5", "0.1", "0.03", "0.01")},
    **{f"cer γ={g}": ("uplink-codec=cer", f"gamma={g}") for g in GAMMAS},
    "cer γ=0.01 falling": ("uplink-codec=cer", "gamma=0.01", "gamma-schedule=linear"),
    **{
        f"cer+stc γ={g} p={p}": ("uplink-codec=cer-stc", f"gamma={g}", f"uplink-p={p}")
        for p in ("0.1", "0.01")
        for g in GAMMAS
    },
}


def slug(label: str) -> str:
    """Return a label as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in label.lower())


def settings_of(task: str) -> tuple[str, ...]:
    """Return a task's settings beside its data's own."""
    if task in SPLITS:
        return PICTURES
    return HIPPOCAMPUS if task == "hippocampus" else ()


def method_jobs(task: str, data: Path) -> list[Job]:
    """Return the comparison on one task, all methods of a seed together."""
    return [
        Job(
            f"{task}-{slug(label)}-s{seed}", data, method, ROUNDS[task], seed, (*settings_of(task), *settings),
            {"task": task, "method": label},
        )
        for seed in SEEDS
        for label, (method, settings) in METHODS.items()
        if task != "heart" or label not in NO_BASE
    ]  # fmt: skip


def lam_jobs(task: str, data: Path) -> list[Job]:
    """Return the runs over λ, and over what else shapes the network at the default λ."""
    seeds = SEEDS[:1] if task == "hippocampus" else SEEDS
    lams = LAMS if task == "heart" else LAMS[::2]
    points: dict[str, tuple[str, ...]] = {f"lam={lam}": (f"lam={lam}",) for lam in lams}
    points |= NETWORKS if task == "heart" else {}
    return [
        Job(
            f"lam-{task}-{slug(label)}-s{seed}", data, "pfednet", ROUNDS[task], seed,
            (*settings_of(task), *settings), {"task": task, "point": label},
        )
        for seed in seeds
        for label, settings in points.items()
    ]  # fmt: skip


def byte_jobs(task: str, data: Path) -> list[Job]:
    """Return pFedNet under every codec."""
    return [
        Job(
            f"bytes-{task}-{slug(label)}-s{seed}", data, "pfednet", ROUNDS[task], seed,
            (*settings_of(task), *settings), {"task": task, "codec": label},
        )
        for seed in SEEDS
        for label, settings in CODECS.items()
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("methods", "lam", "bytes"))
    for task in ROUNDS:
        parser.add_argument(f"--{task}", type=Path, help=f"data root of {task}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes, one core each; 0: as many as cores"
    )
    options = vars(parser.parse_args(argv))
    make = {"methods": method_jobs, "lam": lam_jobs, "bytes": byte_jobs}[options["what"]]
    jobs = [
        job
        for task in ROUNDS
        if (root := options[task.replace("-", "_")]) is not None
        for job in make(task, root)
    ]
    run_jobs(jobs, options["out"], workers=options["workers"])


if __name__ == "__main__":
    main(sys.argv[1:])
