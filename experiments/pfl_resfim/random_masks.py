"""The control for pFL-ResFIM's masks: as many parameters kept at each hospital, but drawn at random, once.

    .venv/bin/python -m experiments.pfl_resfim.random_masks --vessels vessels --brain data/mni152-3x10-seed0

Everything else is the method's: rounds, styles, what is shared and how it is averaged. Results lie beside the study's, as method
"random masks", and `tables` shows them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from common.numerics.rng import generator
from common.payload import Tensors
from common.sensitivity import Measurement
from common.work import SiteWork
from experiments.lab import Job, console, overall, read_results, run_job
from experiments.pfl_resfim.study import RANDOM, RESULTS, ROUNDS, SEEDS


def drawn(self: Measurement, work: SiteWork, names: list[str], own: Tensors, others: Tensors) -> Tensors:
    """Return values that rank a site's parameters at random, the same in every round."""
    draw = generator("random-mask", work.ctx.seed, work.ctx.site)
    sizes = {name: value.shape for name, value in work.model.named_parameters()}
    return {name: torch.rand(sizes[name], generator=draw, dtype=torch.float64) for name in names}


def main(argv: list[str]) -> None:
    """Run what is missing, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vessels", type=Path)
    parser.add_argument("--brain", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: dict[str, Any] = vars(parser.parse_args(argv))
    done = read_results(options["out"])
    for seed in SEEDS:
        for task in ("vessels", "brain"):
            name = f"{task}-random-masks-s{seed}"
            if options[task] is None or name in done:
                continue
            tags = {"task": task, "method": RANDOM}
            job = Job(name, options[task], "pfl-resfim", ROUNDS[task], seed, (), tags)
            with patch.object(Measurement, "residual", drawn):
                found = run_job(job, options["out"])
            console.print(f"{name}: {overall(found):.4f}, {found['seconds']:.0f} s", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
