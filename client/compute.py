"""How the site computes: numeric precision, deterministic kernels, and which layers are in training mode.

Determinism: on the CPU every operation that a network of ours uses is deterministic for a fixed number of threads, and
torch is told to refuse any other. On CUDA, cuDNN and cuBLAS are held to deterministic kernels; a few operations have
none, and torch then warns instead of refusing: pooling over volumes, in `densenet121`, whose weights may then differ in
the last bits between two runs, and the sum of a cross-entropy, where only the reported loss may.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Precision = torch.dtype | None


def choose_precision(device: torch.device, *, amp: bool) -> Precision:
    """Return the half precision that forward passes use, or None for float32.

    CUDA takes bfloat16 where the hardware has it and float16 with loss scaling where not; a CPU always float32.

    Args:
        device: The site's device.
        amp: Whether mixed precision is wanted.
    """
    if not amp or device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def mixed(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context of a forward pass."""
    return nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Hold torch to deterministic kernels; the process's own settings come back on exit."""
    if device.type == "cuda":
        # read by cuBLAS when it first computes in a process; without it its results depend on scheduling
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # a module whose settings are properties
    before = (cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory)
    strict = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        memory.fill_uninitialized_memory = False  # only hides reads of memory nobody wrote, and takes time
        torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; the modes come back on exit."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def training(model: nn.Module, trainable: Collection[str]) -> Iterator[None]:
    """Put a network into training mode with some of its tensors frozen; modes and flags come back on exit.

    A frozen parameter gets no gradient. A normalisation layer with running statistics is frozen as a whole if none of
    its own tensors is to be trained: it then normalises by its running statistics and leaves them as they are.

    Args:
        model: The network.
        trainable: State-dict keys to train; the others are frozen.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with _modes_kept(model):
        model.train()
        for name, module in model.named_modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                own = {f"{name}.{key}" if name else key for key in module.state_dict()}
                module.train(not own.isdisjoint(trainable))
        try:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = None


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
