"""What a Fisher sketch costs and how much it catches, on the trial's own 3D network and data.

    .venv/bin/python -m tests.bench.fisher [--rank 8] [--oversampling 2] [--samples 4,8] [--rounds 3]

In one run, in CPU seconds of one thread: a local epoch; cold and warm sketches as multiples of it; and the captured energy
tr(U H Uᵀ) over that of the exact leading eigenpairs, for H over the sketch's own samples and over all training samples.
The model moves by one local epoch between sketches, as in a federation's rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from client.data.datalist import read_datalist
from client.data.dataset import SiteDataset
from client.data.mni import write_mni_trial
from client.trainer import Trainer
from common.federation import find_sites, read_federation
from common.fisher import leading
from common.method import RoundContext
from common.models import build_model, parameter_groups
from common.numerics.curvature import GGN, flat_function
from common.numerics.subspace import captured_energy, subspace_iteration
from common.tasks import get_task
from tests.bench.environment import write

EXACT_ITERATIONS = 6


def make_trainer(folder: Path) -> Trainer:
    """Return the trainer of one hospital of the default trial."""
    write_mni_trial(folder, sites=1, seed=0, subjects=20)
    config = read_federation(folder).config()
    ((alias, data),) = find_sites(folder).items()
    network = build_model(config.model, config.data, seed=0)
    trainer = Trainer(
        config, SiteDataset(read_datalist(data, alias), config.data), network, parameter_groups(network),
        get_task(config.data, config.train), device=torch.device("cpu"), amp=False,
        check_cancelled=lambda: None, on_progress=lambda *_: None,
    )  # fmt: skip
    trainer.begin(RoundContext("bench", 1, 8, 0, alias))
    return trainer


def fisher(trainer: Trainer, count: int) -> GGN:
    """Return the operator over so many samples at the trainer's present weights."""
    theta, function = flat_function(trainer.model, [name for name, _ in trainer.model.named_parameters()])
    batches = [(image.clone(), label.clone()) for image, label in trainer.samples(count)]
    return GGN(function, theta, trainer.likelihood, lambda: batches)


def best_energy(operator: GGN, rank: int, start: Tensor | None) -> tuple[float, Tensor]:
    """Return the sum of the leading eigenvalues, from an iteration far beyond what a sketch may cost."""
    pairs, basis = subspace_iteration(
        operator, rank, oversampling=rank, iterations=EXACT_ITERATIONS if start is None else 2, start=start
    )
    return float(pairs.lam.sum()), basis


def main() -> None:
    """Measure and write build/bench/fisher.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--oversampling", type=int, default=2)
    parser.add_argument("--samples", default="4,8", help="samples of the sketch, several with commas")
    parser.add_argument("--rounds", type=int, default=3, help="warm sketches after the cold one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder) / "data")
        started = time.process_time()
        trainer.fit(epochs=4)
        epoch = (time.process_time() - started) / 4
        counts = [int(part) for part in arguments.samples.split(",")]
        rows: list[dict[str, float]] = []
        bases: dict[int, Tensor | None] = dict.fromkeys(counts)
        exact: dict[int, Tensor | None] = dict.fromkeys([*counts, trainer.visits])
        for number in range(arguments.rounds + 1):
            with trainer.inspecting():
                whole = fisher(trainer, trainer.visits)
                most, exact[trainer.visits] = best_energy(whole, arguments.rank, exact[trainer.visits])
                for count in counts:
                    own = fisher(trainer, count)
                    started = time.process_time()
                    pairs, bases[count] = leading(
                        own,
                        arguments.rank,
                        bases[count],
                        oversampling=arguments.oversampling,
                        iterations=3,
                        warm=1,
                        seed=0,
                    )
                    seconds = time.process_time() - started
                    own_most, exact[count] = best_energy(own, arguments.rank, exact[count])
                    rows.append(
                        {
                            "round": number, "samples": count, "epochs": seconds / epoch, "products": pairs.products,
                            "energy": captured_energy(own, pairs.U, own_most),
                            "energy_of_all_samples": captured_energy(whole, pairs.U, most),
                        }
                    )  # fmt: skip
                    print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
            trainer.begin(RoundContext("bench", number + 2, 8, 0, trainer.ctx.site))
            trainer.fit(epochs=1)
    warm = {
        count: {
            key: statistics.median(row[key] for row in rows if row["samples"] == count and row["round"])
            for key in ("epochs", "energy", "energy_of_all_samples")
        }
        for count in counts
    }
    figures = {
        "parameters": sum(value.numel() for value in trainer.model.parameters()),
        "rank": arguments.rank,
        "oversampling": arguments.oversampling,
        "samples_of_an_epoch": trainer.visits,
        "epoch_cpu_seconds": epoch,
        "warm_median": warm,
        "sketches": rows,
    }
    print(f"written: {write('fisher', figures)}")


if __name__ == "__main__":
    main()
