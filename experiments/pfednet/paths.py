"""How the hospitals' models gather as λ grows (the paper's Fig. 2), on the heart data.

    .venv/bin/python -m experiments.pfednet.paths heart --out build/experiments/pfednet/tables

Each hospital's logistic regression after the last round, for λ from 0 to 1, on the first two principal axes of all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from experiments.fipa.plots import COLOURS, panels, save
from experiments.lab import Job, run_job
from experiments.pfednet.study import ROUNDS
from experiments.tables import finish

LAMS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0)


def models(data: Path, lam: float, work: Path) -> dict[str, np.ndarray]:
    """Run pFedNet and return every hospital's parameters as one row."""
    job = Job(f"path-{lam:g}", data, "pfednet", ROUNDS["heart"], 0, (f"lam={lam}", "network=complete"))
    run_job(job, work, keep=work / job.name)
    found = {}
    for path in sorted((work / job.name / "models").glob("personal-*.safetensors")):
        tensors = load_file(path)
        found[path.stem.removeprefix("personal-")] = np.concatenate(
            [tensors[name].ravel() for name in sorted(tensors)]
        )
    return found


def main(argv: list[str]) -> None:
    """Run all λ and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="data root of the heart hospitals")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        runs = {lam: models(options.data, lam, Path(work)) for lam in LAMS}
    sites = sorted(runs[0.0])
    rows = np.stack([runs[lam][site] for lam in LAMS for site in sites]).astype(np.float64)
    centred = rows - rows.mean(axis=0)
    _, values, axes_ = np.linalg.svd(centred, full_matrices=False)
    plane = (centred @ axes_[:2].T).reshape(len(LAMS), len(sites), 2)
    spread = {
        f"{lam:g}": float(np.linalg.norm(block - block.mean(axis=0), axis=1).mean())
        for lam, block in zip(LAMS, rows.reshape(len(LAMS), len(sites), -1), strict=True)
    }
    figure, panels_ = panels(1, 1, width=4.6, height=3.8)
    one = panels_[0][0]
    for number, site in enumerate(sites):
        one.plot(*plane[:, number].T, color=COLOURS[number], marker=".", ms=4, lw=1.2, label=site)
        one.plot(*plane[0, number], color=COLOURS[number], marker="o", ms=7)
    one.plot(*plane[-1].mean(axis=0), color="black", marker="*", ms=11, ls="none", label="λ = 1")
    shares = values[:2] ** 2 / (values**2).sum()
    one.set_xlabel(f"first principal axis ({shares[0]:.0%})", fontsize=8)
    one.set_ylabel(f"second principal axis ({shares[1]:.0%})", fontsize=8)
    one.set_title("Hospitals' models from λ = 0 (large dots) to λ = 1", fontsize=9)
    finish(one)
    save(figure, options.out / "paths.png")
    (options.out / "paths.json").write_text(json.dumps({"mean distance to the mean, by lam": spread}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
