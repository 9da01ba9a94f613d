"""What pFL-ResFIM's mask costs: measurement, spectral transfer and bytes, on the trial's own 3D network and data.

    .venv/bin/python -m tests.bench.resfim [--data DATA] [--patches 4,11] [--samples 0,16,32,64] [--repeats 5]

In one run, in CPU seconds of one thread; medians over repetitions in which everything takes turns:

    epoch        a local epoch of one hospital; the model moves by it between measurements, as between a federation's rounds
    mask         residual against the two other hospitals' styles, normalisation and selection, as a round does it
    parts        of one measurement: reading the samples, transfer, gradients of single samples, normalisation and selection;
                 beside them forward and backward passes of the same samples in training batches, the least gradients can cost
    transfer     images a second into another style
    masks        bytes of real masks, and of random ones with as many sensitive values in each tensor, against
                 Σ log2 C(n, k) / 8 over the tensors. "codes" is what common/resfim.py makes; "sent" the whole payload as it
                 travels, with names, shapes and checksum; "codec" the codec "mask" with its header and checksum

An epoch of the default data has 24 samples, fewer than `samples` asks for; more patches a case make a larger hospital.
Targets: a mask within 1.5 epochs at a fixed sample, masks within 2 % of the bound.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from scipy.special import gammaln
from torch import Tensor

from client.data.datalist import read_datalist
from client.data.dataset import SiteDataset
from client.data.mni import write_mni_trial
from client.trainer import Trainer
from common import resfim
from common.codecs import CODECS
from common.federation import find_sites, read_federation
from common.method import RoundContext
from common.methods.pfl_resfim import ResFIMParams, splittable
from common.models import build_model, parameter_groups
from common.numerics import residual as residuals
from common.numerics.diagonal_fisher import Likelihood, Way, diagonal_fisher
from common.numerics.rng import generator
from common.numerics.spectrum import Window, style_of, transfer, window
from common.payload import Kind, Payload, Tensors
from common.sensitivity import LEAST, MOST, Measurement, measure_style
from common.tasks import get_task
from common.wire import encode_payload
from tests.bench.environment import write

T = TypeVar("T")
Batches = list[tuple[Tensor, Tensor]]

PARAMS = ResFIMParams()
RHOS = (0.05, 0.2, 0.5)
BETAS = (PARAMS.beta, 0.15)
TRANSFERS = 20
MOST_EPOCHS, MOST_OVERHEAD = 1.5, 0.02
SHAPES = {
    "32x32x32, batch 8": (8, 1, 32, 32, 32),
    "64x64x48": (1, 1, 64, 64, 48),
    "96x96x3, batch 8": (8, 3, 96, 96),
}


def cpu(work: Callable[..., T], *given: Any, **settings: Any) -> tuple[T, float]:
    """Return what the work gives and its CPU seconds."""
    began = time.process_time()
    result = work(*given, **settings)
    return result, time.process_time() - began


def make_trainer(root: Path, alias: str, patches: int) -> Trainer:
    """Return the trainer of one hospital, with so many patches of each case in an epoch."""
    config = read_federation(root).config()
    config = config.model_copy(update={"data": config.data.model_copy(update={"patches_per_case": patches})})
    network = build_model(config.model, config.data, seed=0)
    trainer = Trainer(
        config, SiteDataset(read_datalist(find_sites(root)[alias], alias), config.data), network,
        parameter_groups(network), get_task(config.data, config.train), device=torch.device("cpu"), amp=False,
        check_cancelled=lambda: None, on_progress=lambda *_: None,
    )  # fmt: skip
    trainer.begin(RoundContext("bench", 1, 8, 0, alias))
    return trainer


def style(trainer: Trainer) -> Tensors:
    """Return a hospital's style, by form."""
    images = (image for image, _ in trainer.samples(trainer.visits))
    form, found = measure_style(images, beta=PARAMS.beta, bank=0, generator=generator("bench.style"))
    return {form: found}


def select(changes: residuals.Values, rho: float) -> resfim.Masks:
    """Return the mask of a residual, as the method makes it."""
    return ResFIMParams(rho=rho).split.masks(changes)


class Hospital:
    """One hospital, and the other hospitals' styles.

    Args:
        root: Data root.
        patches: Patches a case in an epoch.
    """

    def __init__(self, root: Path, patches: int) -> None:
        own, *others = find_sites(root)
        self.patches = patches
        self.trainer = make_trainer(root, own, patches)
        self.names = splittable(PARAMS, self.trainer.model.state_dict(), self.trainer.groups)
        self.own, self.style_seconds = cpu(style, self.trainer)
        self.others = {
            f"{form}/{alias}": values
            for alias in others
            for form, values in style(make_trainer(root, alias, patches)).items()
        }
        self.round = 1
        self.trainer.fit(epochs=self.trainer.config.train.local_epochs)

    def epoch(self) -> None:
        """Train one epoch, the next round's."""
        self.round += 1
        self.trainer.begin(RoundContext("bench", self.round, 8, 0, self.trainer.ctx.site))
        self.trainer.fit(epochs=1)

    def measurement(self, samples: int) -> Measurement:
        """Return the method's own measurement over so many samples."""
        return replace(PARAMS.measurement, samples=samples)

    def changes(self, samples: int) -> residuals.Values:
        """Return R."""
        return self.measurement(samples).residual(self.trainer, self.names, self.own, self.others)

    def mask(self, samples: int) -> resfim.Masks:
        """Return the mask of a round."""
        return select(self.changes(samples), PARAMS.rho)

    def parts(self, samples: int) -> dict[str, float]:
        """Return the CPU seconds of what a measurement consists of, and of what gradients cost at least."""
        with self.trainer.inspecting() as network:
            given: Batches
            given, read = cpu(lambda: list(self.trainer.samples(samples)))
            (form, own), other = next(iter(self.own.items())), next(iter(self.others.values()))
            restyle = self.measurement(samples).restyler(form, own, other, generator("bench"))
            seconds = {"read": read, "transfer": cpu(lambda: [restyle(image) for image, _ in given])[1]}
            kind = Likelihood(self.trainer.likelihood.kind, self.trainer.likelihood.ignore_index)
            ways: tuple[Way, ...] = ("auto", "vmap", "loop")
            for way in ways:
                _, taken = cpu(diagonal_fisher, network, self.names, lambda: given, kind, way=way)
                seconds[f"gradients_{way}"] = taken
            seconds["batch_gradients"] = cpu(self._batch_gradients, network, kind, given)[1]
        magnitudes = {
            name: value.detach().double().abs()
            for name, value in self.trainer.model.named_parameters()
            if name in self.names
        }
        seconds["select"] = cpu(select, magnitudes, PARAMS.rho)[1]
        return {"samples": float(sum(len(image) for image, _ in given)), **seconds}

    def _batch_gradients(self, network: torch.nn.Module, kind: Likelihood, batches: Batches) -> int:
        """Go forward and back through batches as they are trained on; return their number."""
        parameters = [value for name, value in network.named_parameters() if name in self.names]
        with torch.enable_grad():
            for image, label in batches:
                torch.autograd.grad(kind(network(image), label).mean(), parameters)
        return len(batches)


def timings(hospitals: list[Hospital], counts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measure epochs and masks in turns."""
    rows: list[dict[str, Any]] = []
    for one in hospitals:
        visits = one.trainer.visits
        fitted = max(LEAST, min(MOST, visits // (1 + len(one.others))))  # what the method takes by default
        sizes = sorted({min(count or fitted, visits) for count in counts})
        rows.append(
            {"patches_per_case": one.patches, "samples_of_an_epoch": visits, "style": one.style_seconds,
             "epoch": [], "mask": {size: [] for size in sizes}, "parts": []}
        )  # fmt: skip
    for _ in range(repeats):
        for one, row in zip(hospitals, rows, strict=True):
            row["epoch"].append(cpu(one.epoch)[1])
            for size in row["mask"]:
                row["mask"][size].append(cpu(one.mask, size)[1])
            row["parts"].append(one.parts(max(row["mask"])))
        print(".", end="", flush=True)
    print()
    for row in rows:
        epoch = statistics.median(row["epoch"])
        row["epochs"] = {
            size: {"median": statistics.median(each) / epoch,
                   "samples_within_target": MOST_EPOCHS * epoch / statistics.median(each) * size,
                   "paired": [mask / one for mask, one in zip(each, row["epoch"], strict=True)]}
            for size, each in row["mask"].items()
        }  # fmt: skip
        row["parts"] = {key: statistics.median(part[key] for part in row["parts"]) for key in row["parts"][0]}
    return rows


def transfers(images: Tensor, values: Tensor, bins: Window) -> int:
    """Bring images into a style some times; return how many images that were."""
    for _ in range(TRANSFERS):
        transfer(images, values, bins)
    return TRANSFERS * len(images)


def rates(repeats: int) -> dict[str, dict[str, float]]:
    """Measure images a second into another style, for the default window and a wide one."""
    found: dict[str, dict[str, float]] = {}
    for label, shape in SHAPES.items():
        drawn = generator("bench.transfer", *shape)
        images, theirs = torch.rand(shape, generator=drawn), torch.rand(shape, generator=drawn) * 2
        for beta in BETAS:
            bins = window(shape[2:], beta=beta)
            values = style_of([theirs], bins)
            transfers(images, values, bins)
            each = [
                count / seconds
                for count, seconds in (cpu(transfers, images, values, bins) for _ in range(repeats))
            ]
            found.setdefault(label, {})[f"beta {beta:g}"] = statistics.median(each)
    return found


def bound_bytes(masks: resfim.Masks) -> float:
    """Return Σ log2 C(n, k) / 8 over the tensors."""
    bits = 0.0
    for mask in masks.values():
        n, k = mask.numel(), int(mask.sum())
        bits += float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) / math.log(2)
    return bits / 8


def shuffled(masks: resfim.Masks) -> resfim.Masks:
    """Return random masks with as many sensitive values in each tensor."""
    drawn = generator("bench.shuffled")
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=drawn)].reshape(mask.shape)
        for name, mask in masks.items()
    }


def coded(masks: resfim.Masks, weights: Tensors) -> dict[str, float]:
    """Return the bytes of masks in every form, and those of the answer that they leave."""
    codes = resfim.pack_masks(masks)
    back = resfim.unpack_masks(codes, weights, who="bench")
    if any(not torch.equal(back.get(name, torch.zeros_like(mask)), mask) for name, mask in masks.items()):
        raise SystemExit("The masks did not come back as they were.")
    head, blob = encode_payload(Payload("sensitive", Kind.SENSITIVITY_MASK, codes))
    shared = {name: value for name, value in weights.items() if name in masks}
    _, model = encode_payload(Payload("model", Kind.MODEL, resfim.kept_values(shared, masks)))
    _, whole = encode_payload(Payload("model", Kind.MODEL, shared))
    bound, sent = bound_bytes(masks), len(head.SerializeToString()) + len(blob)
    codec = len(CODECS["mask"].encode(masks))
    return {
        "tensors": len(masks), "tensors_with_a_mask": len(codes), "parameters": sum(m.numel() for m in masks.values()),
        "sensitive": residuals.share(masks), "bound": bound, "codes": len(blob), "sent": sent, "codec": codec,
        "codes_above": len(blob) / bound - 1, "sent_above": sent / bound - 1, "codec_above": codec / bound - 1,
        "answer_of_fedavg": (len(model) + sent) / len(whole),
    }  # fmt: skip


def run(root: Path, patches: list[int], counts: list[int], repeats: int) -> dict[str, Any]:
    """Measure everything once."""
    hospitals = [Hospital(root, count) for count in patches]
    rows = timings(hospitals, counts, repeats)
    largest = hospitals[-1]
    changes, weights = largest.changes(max(counts)), largest.trainer.weights()
    masks: list[dict[str, Any]] = []
    for rho in RHOS:
        real = select(changes, rho)
        masks.append({"rho": rho, "real": coded(real, weights), "random": coded(shuffled(real), weights)})
    return {
        "network": "3D U-Net of the default trial", "measured_parameters": sum(v.numel() for v in changes.values()),
        "other_styles": len(largest.others), "repeats": repeats, "threads": torch.get_num_threads(),
        "cost": rows, "images_per_second": rates(repeats), "masks": masks,
        "within_target": {
            "epochs": {
                f"{row['samples_of_an_epoch']}/{size}": value["median"] <= MOST_EPOCHS
                for row in rows for size, value in row["epochs"].items()
            },
            "bytes": all(row["real"][form] <= MOST_OVERHEAD for row in masks for form in ("codes_above", "sent_above")),
        },
        "load_average": os.getloadavg(),
    }  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    for row in figures["cost"]:
        epoch = statistics.median(row["epoch"])
        print(f"epoch of {row['samples_of_an_epoch']} samples: {epoch:.2f} CPU s")
        for size, value in row["epochs"].items():
            pairs = value["paired"]
            print(
                f"  mask, {size:3} samples: {value['median']:.2f} epochs ({min(pairs):.2f} to {max(pairs):.2f})"
            )
        print("  parts, s: " + ", ".join(f"{key} {value:.3f}" for key, value in row["parts"].items()))
    for label, values in figures["images_per_second"].items():
        print(f"transfer, {label}: " + ", ".join(f"{key} {value:.0f}/s" for key, value in values.items()))
    for row in figures["masks"]:
        for kind in ("real", "random"):
            one = row[kind]
            print(
                f"mask, rho {row['rho']:g}, {kind:6}: bound {one['bound']:.0f}, codes {one['codes']} ({one['codes_above']:+.2%}), "
                f"sent {one['sent']} ({one['sent_above']:+.2%}), codec {one['codec']} ({one['codec_above']:+.2%}); answer "
                f"{one['answer_of_fedavg']:.3f} of FedAvg's"
            )


def main(argv: list[str]) -> None:
    """Measure and write build/bench/resfim.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="data root of a default trial; without it one is made")
    parser.add_argument("--patches", default="4,11", help="patches a case in an epoch, several with commas")
    parser.add_argument(
        "--samples",
        default="0,16,32,64",
        help="samples of a measurement, several with commas; 0: the method's default",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.inner:
        # BLAS and OpenMP read their number of threads when they are loaded
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        again = [sys.executable, "-m", "tests.bench.resfim", *argv, "--inner"]
        subprocess.run(again, env=os.environ | threads, check=True)
        return
    torch.set_num_threads(1)
    patches, counts = ([int(part) for part in text.split(",")] for text in (options.patches, options.samples))
    with tempfile.TemporaryDirectory() as folder:
        root = options.data
        if root is None:
            root = Path(folder) / "data"
            write_mni_trial(root, sites=3, seed=0)
        figures = run(root, patches, counts, options.repeats)
    show(figures)
    print(f"written: {write('resfim', figures)}")


if __name__ == "__main__":
    main(sys.argv[1:])
