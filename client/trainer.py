"""The one local loop: trains, evaluates and predicts for every method (`SiteWork` in common/method.py).

Everything drawn derives from (seed, site, round, epoch or step) and nothing else: neither from the stream nor from
what ran before, so two branches of a method see the same batches and the same dropout, and a restarted site repeats a
round to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from client.batches import without_single
from client.compute import choose_precision, deterministic, evaluating, mixed, training
from client.optimizers import LocalOptimizers
from common.config import RunConfig
from common.errors import ConfigError, DataError, TrainingError, nearest
from common.models import template
from common.numerics.rng import derive_seed, forked_torch_rng
from common.payload import State, Tensors, check_like
from common.tasks import Sums, Task
from common.work import FitStats, Groups, Hook, LossTerm, RoundContext

# On CUDA, looking at the loss waits for the device; every so many steps is soon enough.
LOOK_EVERY = 16
TRAIN, EVALUATE = "train", "evaluate"


class Case(Protocol):
    """What is evaluated at a time: one volume, or several images or rows (client/data/dataset.py, EvalCase)."""

    alias: str
    image: Tensor
    label: Tensor
    spacing: tuple[float, ...]
    cases: int


class Dataset(Protocol):
    """What the trainer draws on (client/data/dataset.py, SiteDataset)."""

    @property
    def site(self) -> str:
        """Return the site's alias."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Return the cases by split."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches an epoch has."""

    def training_batches(
        self, *, seed: int, epoch: int, batch_size: int, augment: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """Yield an epoch's batches, a function of the arguments alone."""

    def evaluation_cases(self, split: str) -> Iterator[Case]:
        """Yield a split's cases."""


class Trainer:
    """What the worker offers a site half: the network, the data, the one local loop.

    Args:
        config: The run's configuration.
        dataset: The site's cases.
        network: The run's network; it is moved to the device and changed in place.
        groups: Its parameter groups.
        task: Loss and figures.
        device: Where to compute.
        amp: Mixed precision, on CUDA; a CPU computes in float32 in any case.
        check_cancelled: Called before every step and window; raises when nobody waits any more.
        on_progress: Called with (phase, steps done, steps planned).

    Attributes:
        ctx: The round's context; round 0 before `begin`.
        model: The network on its device.
        cases: Training cases at the site.
        likelihood: The task's cross-entropy as a loss of the logits.
        lr: The run's learning rate.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        network: nn.Module,
        groups: Groups,
        task: Task,
        *,
        device: torch.device,
        amp: bool,
        check_cancelled: Callable[[], None],
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.model = network.to(device)
        self.groups = groups
        self.task = task
        self.device = device
        self.cases = dataset.counts.get("training", 0)
        self.likelihood = task.likelihood
        self.lr = config.train.lr
        self.ctx = RoundContext("", 0, config.rounds.rounds, config.seed, dataset.site)
        self._template = template(network)
        self._precision = choose_precision(device, amp=amp)
        self._optimizers = LocalOptimizers(config.train, self.model, scaled=self._precision is torch.float16)
        self._check_cancelled = check_cancelled
        self._on_progress = on_progress
        self._phase = TRAIN
        # a classifier sees one vector a sample in its last layers, a segmenter many voxels
        self._pairs = config.data.task != "segmentation" and any(
            isinstance(module, _BatchNorm) for module in network.modules()
        )

    def begin(self, ctx: RoundContext) -> None:
        """Enter a round."""
        self.ctx = ctx
        self._phase = TRAIN

    def progress(self, phase: str) -> None:
        """Tell the operator what the site is doing now (a short fixed word); the next steps count under it."""
        self._phase = phase
        self._on_progress(phase, 0, 0)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load a complete state dict (CPU tensors) into the network.

        Raises:
            PayloadError: Other names, shapes or dtypes than the network's.
        """
        check_like(weights, self._template, who=self.ctx.site, what="weights")
        self.model.load_state_dict(dict(weights))

    def weights(self) -> Tensors:
        """Return a detached copy of the network's state dict on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def on_device(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return copies of tensors on the network's device (for loss terms)."""
        return {name: tensor.detach().to(self.device, copy=True) for name, tensor in tensors.items()}

    @property
    def visits(self) -> int:
        """Return how many training samples (patches, pictures, rows) an epoch has."""
        return self.dataset.steps_per_epoch(1)

    @contextmanager
    def inspecting(self) -> Iterator[nn.Module]:
        """Lend the network in evaluation mode, in float32, with deterministic kernels."""
        with deterministic(self.device), evaluating(self.model):
            yield self.model

    def samples(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (image, label) batches of a fixed set of training samples, on the device, without augmentation.

        The set is a function of (seed, site) alone: the same in every round and for every caller.

        Args:
            most: Samples in the set; an epoch's at most.
        """
        left = min(most, self.visits)
        planned = left
        batches = self.dataset.training_batches(
            seed=derive_seed("samples", self.ctx.seed, self.ctx.site),
            epoch=0,
            batch_size=self.config.train.batch_size,
            augment=False,
        )
        with closing(batches):  # type: ignore[type-var]
            for batch in batches:
                self._check_cancelled()
                image, label = batch["image"][:left], batch["label"][:left]
                left -= len(label)
                yield image.to(self.device), label.to(self.device)
                self._on_progress(self._phase, planned - left, planned)
                if left <= 0:
                    return

    def optimizer_state(self) -> State:
        """Return the optimisers that are kept over the rounds; empty where `train.optimizer_state` is "fresh"."""
        return self._optimizers.state()

    def restore_optimizer(self, state: State) -> None:
        """Put kept optimisers back, or forget them where the state is empty.

        Raises:
            PayloadError: A state of another network.
        """
        self._optimizers.restore(state)

    def fit(
        self,
        *,
        stream: str = "main",
        epochs: int | None = None,
        steps: int | None = None,
        loss_term: LossTerm | None = None,
        after_backward: Hook | None = None,
        after_step: Hook | None = None,
        lr_scale: float = 1.0,
        trainable: Sequence[str] | None = None,
    ) -> FitStats:
        """Train the network in place with the run's optimiser; arguments as of `SiteWork.fit`.

        A step is: forward, loss (task's plus term), backward, `after_backward`, clipping to `train.clip_norm`,
        optimiser, `after_step`. Clipping comes after the hook, so that it bounds what the optimiser is given.
        Nothing happens where there is nothing to do: no epoch, no step, or no parameter among `trainable`.

        Returns:
            Steps, samples, seconds and the mean of the task's own loss over the samples, without the term; NaN
            after no step.

        Raises:
            ConfigError: Unknown names in `trainable`, or both epochs and steps.
            DataError: The site has no training case, or one alone and a classifier with batch normalisation.
            TrainingError: The loss is not finite any more.
            CancelledError: From `check_cancelled`.
        """
        started = time.perf_counter()
        keys = self._trainable(trainable)
        epochs, planned = self._planned(epochs, steps)
        samples, count = 0, 0
        total, watched = torch.zeros(2, dtype=torch.float64, device=self.device)
        if planned and any(name in keys for name, _ in self.model.named_parameters()):
            optimizer, scaler = self._optimizers.open(stream, lr=self.config.train.lr * lr_scale)
            with (
                deterministic(self.device),
                training(self.model, keys),
                closing(self._batches(epochs, steps)) as batches,
            ):
                for count, batch in enumerate(batches, start=1):
                    self._check_cancelled()
                    with forked_torch_rng(self._seed("step", count), self.device):
                        loss, objective = self._step(batch, optimizer, scaler, loss_term, after_backward)
                    if after_step:
                        after_step(self.model)
                    total += loss.double() * len(batch["label"])
                    watched += objective
                    samples += len(batch["label"])
                    if self.device.type == "cpu" or count % LOOK_EVERY == 0:
                        self._check_finite(watched, count)
                    self._on_progress(self._phase, count, planned)
            self._check_finite(watched, count)
            self.model.zero_grad(set_to_none=True)  # as large as the model, and of no more use
        mean = float(total) / samples if samples else math.nan
        return FitStats(count, samples, mean, time.perf_counter() - started)

    def evaluate(self, weights: Mapping[str, Tensor], split: str, *, hd95: bool) -> tuple[Sums, int]:
        """Return the figures of some weights on a split, as sums, and its number of cases.

        The network, its modes and all global state are afterwards as before.

        Raises:
            PayloadError: Weights of another network.
            TrainingError: The model's output is not finite.
        """
        meter = self.task.meter(hd95=hd95)
        planned, done = self.dataset.counts.get(split, 0), 0
        with self.predicting(weights) as predict:
            for case in self.dataset.evaluation_cases(split):
                output = predict(case.image)
                if not bool(torch.isfinite(output).all()):
                    raise TrainingError(
                        f"{self.ctx.site}: the model's output on {case.alias} is not finite; it has diverged. "
                        "Lower train.lr, or bound the gradient with train.clip_norm.",
                        site=self.ctx.site,
                    )
                meter.add(output, case.label.to(output.device), case.spacing)
                done += case.cases
                self._on_progress(EVALUATE, done, planned)
        return meter.finish(), done

    @contextmanager
    def predicting(self, weights: Mapping[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the network, loaded with some weights, as a function from images to float32 logits.

        Raises:
            PayloadError: Weights of another network.
        """
        before = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

        def network(windows: Tensor) -> Tensor:
            self._check_cancelled()
            with mixed(self.device, self._precision):
                output: Tensor = self.model(windows)
            return output.float()

        def predict(image: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.task.infer(network, image.to(self.device))

        try:
            self.load(weights)
            with deterministic(self.device), evaluating(self.model):
                yield predict
        finally:
            self.model.load_state_dict(before)

    def _step(
        self,
        batch: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        loss_term: LossTerm | None,
        after_backward: Hook | None,
    ) -> tuple[Tensor, Tensor]:
        """Take one step and return the task's loss and the whole objective, detached."""
        image = batch["image"].to(self.device, non_blocking=True)
        label = batch["label"].to(self.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with mixed(self.device, self._precision):
            loss = self.task.loss(self.model(image), label)
            objective = loss if loss_term is None else loss + loss_term(self.model)
        scaler.scale(objective).backward()
        scaler.unscale_(optimizer)  # hooks and clipping see true gradients
        if after_backward:
            after_backward(self.model)
        if self.config.train.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), objective.detach()

    def _batches(self, epochs: int, steps: int | None) -> Generator[dict[str, Tensor], None, None]:
        """Yield the round's batches from epoch 0 on: so many epochs, or exactly so many steps."""
        epoch = done = 0
        while epoch < epochs if steps is None else done < steps:
            before = done
            batches = self.dataset.training_batches(
                seed=self._seed("batches"), epoch=epoch, batch_size=self.config.train.batch_size
            )
            for batch in without_single(batches) if self._pairs else batches:
                yield batch
                done += 1
                if done == steps:
                    return
            if done == before:
                raise self._too_few_cases(1)
            epoch += 1

    def _planned(self, epochs: int | None, steps: int | None) -> tuple[int, int]:
        """Return epochs and steps to come; with batches merged there may be fewer steps."""
        if epochs is not None and steps is not None:
            raise ConfigError(f"Local training takes epochs or steps, got both ({epochs} and {steps}).")
        if self.cases < 1 + self._pairs:
            raise self._too_few_cases(1 + self._pairs)
        epochs = max(self.config.train.local_epochs if epochs is None else epochs, 0)
        if steps is not None:
            return epochs, max(steps, 0)
        return epochs, epochs * self.dataset.steps_per_epoch(self.config.train.batch_size)

    def _trainable(self, keys: Sequence[str] | None) -> frozenset[str]:
        if keys is None:
            return frozenset(self._template)
        for key in keys:
            if key not in self._template:
                raise ConfigError(
                    f"The network has no tensor '{key}' to train. {nearest(key, self._template)}"
                )
        return frozenset(keys)

    def _check_finite(self, objectives: Tensor, step: int) -> None:
        if not math.isfinite(float(objectives)):
            raise TrainingError(
                f"{self.ctx.site}: the training loss is not finite any more by step {step} of round "
                f"{self.ctx.round}; nothing of it is used. Lower train.lr, or bound the gradient with "
                "train.clip_norm.",
                site=self.ctx.site,
            )

    def _too_few_cases(self, needed: int) -> DataError:
        why = "" if needed == 1 else " for batch normalisation; or choose model.norm 'group'"
        return DataError(
            f"{self.ctx.site}: {self.cases} training cases, at least {needed} needed{why}. Give the site more cases "
            "in split 'training'.",
            site=self.ctx.site,
        )

    def _seed(self, kind: str, *number: int) -> int:
        return derive_seed(kind, self.ctx.seed, self.ctx.site, self.ctx.round, *number)
