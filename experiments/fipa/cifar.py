"""FIPA against FedAvg and matched controls on CIFAR-10 (JPEG copies): FedAvg warm-up, then 15 rounds an arm.

    python -m experiments.fipa.cifar --data FOLDER --out FOLDER
    python -m experiments.fipa.cifar --summary --out FOLDER

Finished jobs are kept as JSON and skipped when the command is given again. All arms of one seed start from the same
checkpoint and see the same clients in the same rounds, and the same order, crops and flips at each client.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from common.numerics.gram import combine, gram, solve
from common.numerics.rng import derive_seed, generator
from common.numerics.subspace import subspace_iteration
from experiments.fipa import cifar_data, cifar_model
from experiments.fipa.cifar_data import Images
from experiments.fipa.cifar_model import NETWORKS, Network

CLIENTS = 100
PER_ROUND = 5
RATE, RATE_DECAY = 0.1, 0.998
PUBLISHED_WARMUP = 1000  # rounds before the comparison in the paper


@dataclass(frozen=True)
class Arm:
    """One way to go on from the checkpoint.

    Attributes:
        rate: Factor on the local learning rate.
        server_step: FedAvg's step on the mean update; for FIPA the factor before (H + beta I)^{-1} b.
        fipa: Whether the server solves FIPA's system.
    """

    rate: float
    server_step: float
    fipa: bool = False


BETA = 0.5
# The published code multiplies by gamma * beta (both 0.5), the printed formula by gamma alone.
ARMS = {
    "fedavg": Arm(1.0, 1.0),
    "fedavg_low": Arm(0.1, 1.0),
    "fedavg_damped": Arm(1.0, 0.25),
    "fipa": Arm(0.1, 0.5 * BETA, fipa=True),
    "fedavg_low_damped": Arm(0.1, 0.25),
    "fipa_paper": Arm(0.1, 0.5, fipa=True),
}
FIRST_ARMS = tuple(name for name in ARMS if name != "fipa_paper")


@dataclass(frozen=True)
class Settings:
    """What one output folder holds; jobs of other settings are refused there.

    Attributes:
        warmup: FedAvg rounds before the comparison.
        rounds: Rounds of the comparison.
        rank: Eigenpairs r a client sends.
        oversampling: Extra columns s of the subspace iteration.
        iterations: Power iterations q.
    """

    warmup: int = 200
    rounds: int = 15
    rank: int = 200
    oversampling: int = 50
    iterations: int = 5


@dataclass(frozen=True)
class Case:
    """A model, a concentration of the split and a seed."""

    model: str
    alpha: float
    seed: int

    def name(self, arm: str) -> str:
        """Return the name of a job's files without the ending."""
        return f"{self.model}_alpha{self.alpha:g}_seed{self.seed}_{arm}"


def job_list(seeds: int = 3, alphas: tuple[float, ...] = (0.05, 0.3)) -> Iterator[tuple[Case, str]]:
    """Yield the jobs, those first whose absence would hurt most; a job never comes before its case's first arms."""
    small = [Case("cnn-8k", alpha, seed) for seed in range(seeds) for alpha in alphas]
    large = [Case("cnn-23k", alpha, seed) for seed in range(seeds) for alpha in alphas]
    one = len(alphas)  # cases of the first seed
    yield from ((case, arm) for case in small for arm in FIRST_ARMS)
    yield from ((case, "fipa_paper") for case in small[:one])
    yield from ((case, arm) for case in large[:one] for arm in FIRST_ARMS)
    yield from ((case, "fipa_paper") for case in small[one:])
    yield from ((case, arm) for case in large[one:] for arm in FIRST_ARMS)
    yield from ((case, "fipa_paper") for case in large)


def learning_rate(round_: int, settings: Settings) -> float:
    """Return the local rate of a round, counted from 0 at the start of the warm-up.

    The shortened warm-up runs through the published schedule 0.1 * 0.998^round faster, so that the comparison starts at
    the rate it has in the paper after 1000 rounds; from there one round is one step of the schedule again.
    """
    if round_ < settings.warmup:
        published = round_ * PUBLISHED_WARMUP / settings.warmup
    else:
        published = PUBLISHED_WARMUP + round_ - settings.warmup
    return float(RATE * RATE_DECAY**published)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


@dataclass
class Federation:
    """The split data of one case and what one round does."""

    case: Case
    settings: Settings
    clients: list[Images]
    test: Images

    @property
    def network(self) -> Network:
        """The network of the case."""
        return NETWORKS[self.case.model]

    def selected(self, round_: int) -> list[int]:
        """Return the clients of a round."""
        return cifar_data.select_clients(
            CLIENTS, PER_ROUND, generator("cifar clients", self.case.seed, round_)
        )

    def updates(self, theta: Tensor, round_: int, factor: float) -> Tensor:
        """Return the update of every selected client, (5, p)."""
        rate = factor * learning_rate(round_, self.settings)
        rows = []
        for client in self.selected(round_):
            source = generator("cifar local", self.case.seed, round_, client)
            rows.append(cifar_model.train(self.network, theta, self.clients[client], rate, source) - theta)
        return torch.stack(rows)

    def accuracy(self, theta: Tensor) -> float:
        """Return the accuracy on the test images."""
        return cifar_model.accuracy(self.network, theta, self.test)


def fipa_step(
    federation: Federation, theta: Tensor, updates: Tensor, round_: int
) -> tuple[Tensor, dict[str, float]]:
    """Return (H + beta I)^{-1} b with H = mean_m U_m^T L_m U_m and b = mean_m U_m^T L_m U_m d_m.

    Args:
        federation: The federation; H is taken at theta on the un-augmented data of the selected clients.
        theta: Broadcast parameters (p,).
        updates: d_m, (M, p), in the order of `federation.selected`.
        round_: Round number.

    Returns:
        The direction (p,) in the dtype of theta, and figures of the round: share of tr H_m in the sketches, largest and
        smallest kept eigenvalue (means over the clients).
    """
    settings, sketches, values, projected, energy = federation.settings, [], [], [], []
    # The reference starts every round from one seed, common to the clients.
    seed = derive_seed("cifar sketch", federation.case.seed, round_)
    for client, update in zip(federation.selected(round_), updates, strict=True):
        x = cifar_data.to_float(federation.clients[client].pixels)
        operator = cifar_model.FactoredGGN(federation.network, theta, x)
        pairs, _ = subspace_iteration(
            operator,
            settings.rank,
            oversampling=settings.oversampling,
            iterations=settings.iterations,
            seed=seed,
        )
        sketches.append(pairs.U)
        values.append(pairs.lam.double())
        projected.append(pairs.U.double() @ update.double())
        energy.append(float(pairs.lam.sum()) / operator.trace())
    V = torch.cat(sketches)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, V.shape[1], 4096):
            part = slice(start, min(start + 4096, V.shape[1]))
            yield part, V[:, part].double()

    G, _ = gram(blocks, None)
    c = solve(G, torch.cat(values) / len(values), torch.cat(projected), beta=BETA)
    step = torch.empty_like(theta)
    for part, value in combine(blocks, c):
        step[part] = value.to(theta.dtype)
    figures = {
        "energy": float(np.mean(energy)),
        "lambda_max": float(np.mean([float(v[0]) for v in values])),
        "lambda_min": float(np.mean([float(v[-1]) for v in values])),
    }
    return step, figures


def warm_up(federation: Federation, every: int = 25) -> tuple[Tensor, dict[str, Any]]:
    """Run FedAvg from a random start; returns the checkpoint (p,) and the course of the accuracy."""
    theta = federation.network.initial(generator("cifar start", federation.case.seed, federation.case.model))
    course = []
    for round_ in range(federation.settings.warmup):
        theta = theta + federation.updates(theta, round_, 1.0).mean(0)
        if (round_ + 1) % every == 0 or round_ + 1 == federation.settings.warmup:
            course.append([round_ + 1, federation.accuracy(theta)])
    return theta, {"accuracy_by_round": course, "start": course[-1][1]}


def refine(federation: Federation, theta: Tensor, arm: Arm) -> dict[str, Any]:
    """Go on from the checkpoint for the rounds of the comparison; returns accuracies and figures by round."""
    settings, accuracies, norms, figures = federation.settings, [], [], []
    for round_ in range(settings.warmup, settings.warmup + settings.rounds):
        updates = federation.updates(theta, round_, arm.rate)
        if arm.fipa:
            direction, of_round = fipa_step(federation, theta, updates, round_)
            figures.append(of_round)
        else:
            direction = updates.mean(0)
        step = arm.server_step * direction
        theta = theta + step
        norms.append([float(step.norm()), float(updates.mean(0).norm())])
        accuracies.append(federation.accuracy(theta))
    return {"accuracy": accuracies, "step_and_mean_update_norm": norms, "sketch": figures}


def run_job(
    case: Case, arm: str, settings: Settings, images: tuple[Images, Images], out: Path
) -> dict[str, Any]:
    """Run one job, the warm-up of its case first where it is missing; returns what was written as JSON."""
    train, test = images
    parts = cifar_data.dirichlet_split(
        train.labels.numpy(), CLIENTS, case.alpha, derive_seed("cifar split", case.seed)
    )
    federation = Federation(case, settings, [train.pick(part) for part in parts], test)
    checkpoint = out / f"{case.name('checkpoint')}.npy"
    if not checkpoint.exists():
        began = time.perf_counter()
        theta, record = warm_up(federation)
        record |= {**asdict(case), "arm": "warmup", "seconds": time.perf_counter() - began}
        write_atomic(out / f"{case.name('warmup')}.json", json.dumps(record, indent=1).encode())
        with (temporary := checkpoint.with_suffix(".tmp")).open("wb") as file:
            np.save(file, theta.numpy())
        os.replace(temporary, checkpoint)
    theta = torch.from_numpy(np.load(checkpoint, allow_pickle=False))
    began = time.perf_counter()
    record = {**asdict(case), "arm": arm, "start": federation.accuracy(theta)}
    record |= refine(federation, theta, ARMS[arm])
    record["seconds"] = time.perf_counter() - began
    write_atomic(out / f"{case.name(arm)}.json", json.dumps(record, indent=1).encode())
    return record


def keep_settings(settings: Settings, out: Path) -> None:
    """Note the settings in the folder, or refuse a folder that holds jobs of others.

    Raises:
        ValueError: The folder was begun with other settings.
    """
    path = out / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != asdict(settings):
            raise ValueError(f"This folder holds runs with {found}; choose another folder or those settings.")
    else:
        write_atomic(path, json.dumps(asdict(settings), indent=1).encode())


def main(
    out: Annotated[
        Path, typer.Option(help="Folder for the decoded images, the checkpoints and the results.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(envvar="WARDROUND_DATA", help="Folder that holds cifar10/cifar10_jpeg60k.npz."),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Only tabulate and plot what is finished.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    minutes: Annotated[float, typer.Option(help="No job is begun after this time.")] = 100.0,
    warmup: Annotated[int, typer.Option(min=1, help="FedAvg rounds before the comparison.")] = 200,
    rank: Annotated[int, typer.Option(min=1)] = 200,
    oversampling: Annotated[int, typer.Option(min=0)] = 50,
    iterations: Annotated[
        int, typer.Option(min=1, help="Power iterations q (reference runs: 9, its default: 5).")
    ] = 5,
) -> None:
    """Run the jobs that are not finished yet, or tabulate those that are."""
    console = Console()
    if summary:
        # Here only: a run of many jobs needs no plotting library.
        from experiments.fipa.cifar_summary import summarise

        summarise(out, console)
        return
    if data is None:
        raise typer.BadParameter("Give the data folder with --data or WARDROUND_DATA.")
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(warmup, 15, rank, oversampling, iterations)
    keep_settings(settings, out)
    images = cifar_data.load(data, out)
    ends = time.monotonic() + 60 * minutes
    for case, arm in job_list(seeds):
        if (out / f"{case.name(arm)}.json").exists():
            continue
        if time.monotonic() > ends:
            console.print("The time is over; give the same command again to go on.")
            break
        record = run_job(case, arm, settings, images, out)
        console.print(
            f"{case.name(arm)}: max {max(record['accuracy']):.4f}, mean {np.mean(record['accuracy']):.4f}, "
            f"start {record['start']:.4f}, {record['seconds']:.0f} s"
        )


if __name__ == "__main__":
    typer.run(main)
