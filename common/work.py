"""What a site half works with: the moment, the network's parameter groups, and what the worker offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

from torch import Tensor, nn

from common.errors import ConfigError, nearest
from common.numerics.curvature import OutputLoss
from common.payload import Payload, State, Tensors


@dataclass(frozen=True)
class RoundContext:
    """What both halves know about the moment.

    Attributes:
        run: Run identifier.
        round: 1-based round; the closing evaluation carries rounds + 1.
        rounds: Rounds of the run.
        seed: The run's seed.
        site: Alias of the site concerned ("" at the server when no site is).
    """

    run: str
    round: int
    rounds: int
    seed: int
    site: str = ""


@dataclass(frozen=True)
class Groups:
    """Parameter groups of a network by name: state-dict keys. A key may be in several groups.

    Groups that every network has: extractor and head (together all parameters), norm (parameters and buffers of
    normalisation layers), buffers (all buffers). U-shaped nets add encoder and decoder.
    """

    names: Mapping[str, tuple[str, ...]]

    def __getitem__(self, group: str) -> tuple[str, ...]:
        """Return the state-dict keys of a group; "all" is every parameter.

        Raises:
            ConfigError: Unknown group.
        """
        if group == "all":
            return (*self.names["extractor"], *self.names["head"])
        if group not in self.names:
            raise ConfigError(f"Unknown parameter group '{group}'. {nearest(group, self.names)}")
        return self.names[group]

    def select(self, entries: Iterable[str], among: Sequence[str], *, what: str) -> list[str]:
        """Return the keys that some entries name, in the order of `among`.

        Args:
            entries: Groups, or patterns of keys with * and ?.
            among: The keys to choose from.
            what: Name of the setting, for the sentence.

        Raises:
            ConfigError: An entry that is no group and matches no key, or nothing is left.
        """
        entries, chosen = list(entries), set[str]()
        for entry in entries:
            if entry == "all" or entry in self.names:
                chosen |= set(self[entry])
                continue
            found = {name for name in among if fnmatchcase(name, entry)}
            if not found:
                raise ConfigError(
                    f"{what} '{entry}' is no parameter group and matches no parameter. {nearest(entry, self.names)}"
                )
            chosen |= found
        if not chosen & set(among):
            raise ConfigError(
                f"{what} {entries} leaves no parameter that travels. Use all, or a group of parameters."
            )
        return [name for name in among if name in chosen]


@dataclass
class FitStats:
    """What a call of the local loop did: steps taken, samples seen, mean training loss, seconds."""

    steps: int
    samples: int
    loss: float
    seconds: float


LossTerm = Callable[[nn.Module], Tensor]
Hook = Callable[[nn.Module], None]


class SiteWork(Protocol):
    """What the worker offers a site half during a round: the network, the data, the one local loop.

    Attributes:
        ctx: The round's context, with this site's alias.
        model: The network on the site's device; `load` and `fit` change it.
        groups: Its parameter groups.
        likelihood: The task's cross-entropy as a loss of the logits.
        lr: The run's learning rate.
    """

    ctx: RoundContext
    model: nn.Module
    groups: Groups
    likelihood: OutputLoss
    lr: float

    @property
    def cases(self) -> int:
        """Number of training cases at the site."""

    @property
    def visits(self) -> int:
        """Number of training samples (patches, pictures, rows) in an epoch."""

    def samples(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (image, label) batches of a fixed set of training samples, on the device, without augmentation."""

    def inspecting(self) -> AbstractContextManager[nn.Module]:
        """Lend the network in evaluation mode, in float32, with deterministic kernels."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load a complete state dict (CPU tensors) into the network."""

    def weights(self) -> Tensors:
        """Return a detached copy of the network's state dict on the CPU."""

    def on_device(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return copies of tensors on the network's device (for loss terms)."""

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
        """Train the network in place with the run's optimiser.

        The batches of (seed, site, round) are the same for every stream, so two branches of a method see the same
        data in the same order; a stream has its own optimiser state.

        Args:
            stream: Name of the branch of the method.
            epochs: Local epochs; the run's own number where None.
            steps: Exact number of steps instead of epochs (the data is cycled).
            loss_term: Added to the task's loss; receives the network.
            after_backward: Called between backward and the optimiser's step (gradients are in place).
            after_step: Called after the optimiser's step.
            lr_scale: Factor on the run's learning rate.
            trainable: State-dict keys to train; the others are frozen. All where None.
        """

    def progress(self, phase: str) -> None:
        """Tell the operator what the site is doing now (a short fixed word)."""


@dataclass
class SiteResult:
    """What a site half gives back: what leaves (payloads, case count) and what stays (state).

    Attributes:
        seconds: Seconds by phase spent on other things than training.
    """

    payloads: list[Payload]
    state: State
    cases: int
    stats: FitStats | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class _Tuned:
    """See `tuned`."""

    def __init__(
        self, work: SiteWork, lr_scale: float, steps: int | None, trainable: Sequence[str] | None
    ) -> None:
        self._work = work
        self._lr_scale = lr_scale
        self._steps = steps
        self._trainable = trainable

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def fit(self, *, stream: str = "main", lr_scale: float = 1.0, **options: Any) -> FitStats:
        if stream == "main":
            lr_scale *= self._lr_scale
            if self._steps is not None:
                options |= {"epochs": None, "steps": self._steps}
            if self._trainable is not None:
                options["trainable"] = self._trainable
        return self._work.fit(stream=stream, lr_scale=lr_scale, **options)


def tuned(
    work: SiteWork,
    *,
    lr_scale: float = 1.0,
    steps: int | None = None,
    trainable: Sequence[str] | None = None,
) -> SiteWork:
    """Return a site's work in which the main stream trains otherwise than its method asks; other streams do not.

    Args:
        work: What the worker offers.
        lr_scale: Factor on the learning rate, beside the method's own.
        steps: Local steps in place of the method's epochs or steps; None leaves them.
        trainable: State-dict keys to train in place of the method's; None leaves them.
    """
    return cast(SiteWork, _Tuned(work, lr_scale, steps, trainable))
