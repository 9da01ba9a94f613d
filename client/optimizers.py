"""The local optimisers: one per stream of a method, fresh for every call or kept over the rounds.

Kept ones can be taken out as a `State` (named tensors and scalars) and put back, so that a site that was restarted
goes on to the bit.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from common.config import TrainConfig
from common.errors import PayloadError, WardroundError
from common.payload import State

_STREAM = re.compile(r"[A-Za-z0-9_-]+")
# float16 gradients: below torch's 2^16, which a fresh scaler would halve in the first steps of every call
SCALE = 2.0**12
STEP = "step"


class LocalOptimizers:
    """Optimisers of one network by stream.

    Args:
        train: Kind and settings.
        model: The network on its device; its parameters' identities must not change.
        scaled: Whether losses are scaled (float16).
    """

    def __init__(self, train: TrainConfig, model: nn.Module, *, scaled: bool) -> None:
        self._train = train
        self._parameters = dict(model.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._scaled = scaled
        self._kept: dict[str, tuple[Optimizer, GradScaler]] = {}

    def open(self, stream: str, *, lr: float) -> tuple[Optimizer, GradScaler]:
        """Return a stream's optimiser and loss scaler.

        The optimiser holds all parameters; one without a gradient is left alone, with its state.

        Args:
            stream: Letters, digits, dashes and underscores.
            lr: Learning rate of this call.
        """
        if not _STREAM.fullmatch(stream):
            raise WardroundError(
                f"'{stream}' is no name for a stream: use letters, digits, dashes, underscores."
            )
        found = self._kept.get(stream)
        if found is None:
            scaler = GradScaler(self._device.type, init_scale=SCALE, enabled=self._scaled)
            found = (self._make(lr), scaler)
        for group in found[0].param_groups:
            group["lr"] = lr
        if self._train.optimizer_state == "kept":
            self._kept[stream] = found
        return found

    def state(self) -> State:
        """Return the kept optimisers: tensors "stream/parameter/field" on the CPU; empty where none is kept."""
        state = State()
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        for stream, (optimizer, scaler) in self._kept.items():
            for parameter, fields in optimizer.state.items():
                for field, value in fields.items():
                    if isinstance(value, Tensor):
                        key = f"{stream}/{names[parameter]}/{field}"
                        state.tensors[key] = value.detach().cpu().clone()
            if scaler.is_enabled():
                state.values[f"{stream}/scale"] = scaler.get_scale()
                state.values[f"{stream}/growth"] = int(scaler.state_dict()["_growth_tracker"])
        return state

    def restore(self, state: State) -> None:
        """Replace the kept optimisers by those of a state; an empty state forgets them.

        Raises:
            PayloadError: A tensor that does not belong to this network.
        """
        self._kept.clear()
        if self._train.optimizer_state == "fresh":
            return
        streams = sorted({name.split("/", 1)[0] for name in (*state.tensors, *state.values)})
        for stream in streams:
            optimizer, scaler = self.open(stream, lr=self._train.lr)
            for name, tensor in state.part(stream).items():
                parameter, field = self._find(name, tensor)
                # torch keeps the step count on the CPU
                place = torch.device("cpu") if field == STEP else parameter.device
                optimizer.state[parameter][field] = tensor.detach().to(place, copy=True)
            if scaler.is_enabled() and f"{stream}/scale" in state.values:
                saved = scaler.state_dict()
                saved["scale"] = float(state.values[f"{stream}/scale"])
                saved["_growth_tracker"] = int(state.values[f"{stream}/growth"])
                scaler.load_state_dict(saved)

    def _find(self, name: str, tensor: Tensor) -> tuple[Tensor, str]:
        key, _, field = name.rpartition("/")
        parameter = self._parameters.get(key)
        if parameter is None or (field != STEP and tensor.shape != parameter.shape):
            got = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise PayloadError(
                f"The saved optimiser state does not fit the network: '{key}' has shape {tuple(tensor.shape)}, the "
                f"network has {got}. It belongs to another run: start a new one."
            )
        return parameter, field

    def _make(self, lr: float) -> Optimizer:
        train, parameters = self._train, list(self._parameters.values())
        if train.optimizer == "sgd":
            return SGD(parameters, lr=lr, momentum=train.momentum, weight_decay=train.weight_decay)
        kind = Adam if train.optimizer == "adam" else AdamW
        return kind(parameters, lr=lr, weight_decay=train.weight_decay)
