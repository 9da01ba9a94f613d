"""Networks by name, built from a seed, with named parameter groups.

    network = build_model(config.model, config.data, seed=config.seed)
    groups = parameter_groups(network)          # extractor, head, norm, buffers; encoder, decoder

`MODELS` is the table of contents: one row and one file each, nothing is found by scanning. docs/models.md says
which settings a network reads and how large it is.
"""

from __future__ import annotations

import torch
from torch import nn

from common.config import DataConfig, ModelConfig, TaskName
from common.errors import ConfigError, nearest
from common.method import Groups
from common.models.family import Family, check_task
from common.numerics.rng import derive_seed, forked_torch_rng
from common.payload import Tensors

MODELS: dict[str, Family] = {
    family.name: family
    for family in (
        Family("unet", "common.models.unet", "UNet", ("segmentation",), default_for=("segmentation",)),
        Family("segresnet", "common.models.segresnet", "SegResNet", ("segmentation",)),
        Family("dynunet", "common.models.dynunet", "DynUNet", ("segmentation",)),
        Family(
            "densenet121", "common.models.densenet", "DenseNet121", ("classification",), ("classification",)
        ),
        Family("densenet", "common.models.densenet_small", "DenseNet", ("classification",)),
        Family("logistic", "common.models.logistic", "Logistic", ("tabular",), default_for=("tabular",)),
        Family("mlp", "common.models.mlp", "MultilayerPerceptron", ("tabular",)),
    )
}
AUTO_NORM: dict[TaskName, str] = {"segmentation": "instance", "classification": "batch", "tabular": "none"}


def build_model(model: ModelConfig, data: DataConfig, *, seed: int) -> nn.Module:
    """Build a run's network on the CPU, with fresh weights.

    The weights depend on the configuration and the seed alone; the global generators are left as they were.

    Args:
        model: Name and sizes; name "auto" takes the task's default.
        data: Task, axes, channels, classes and patch.
        seed: The run's seed.

    Returns:
        Network that takes (N, C, *S) or (N, F) float32 and returns logits (N, K, *S) or (N, K).

    Raises:
        ConfigError: Unknown name, a network for another task, or a setting that it cannot honour.
    """
    family = find_family(model.name, data)
    if model.norm == "auto":
        model = model.model_copy(update={"norm": AUTO_NORM[data.task]})
    with forked_torch_rng(derive_seed("model", seed)):
        network = family.build(model, data)
    network.requires_grad_(True)
    return network


def find_family(name: str, data: DataConfig) -> Family:
    """Return the row of a name, or of the task's default for "auto".

    Raises:
        ConfigError: Unknown name, with the nearest known one, or a network for another task.
    """
    if name == "auto":
        return next(family for family in MODELS.values() if data.task in family.default_for)
    if name not in MODELS:
        raise ConfigError(f"Unknown model '{name}'. {nearest(name, [*MODELS, 'auto'])}")
    check_task(MODELS[name], data, MODELS.values())
    return MODELS[name]


def parameter_groups(network: nn.Module) -> Groups:
    """Return the named parameter groups of a network: tuples of state-dict keys in the state dict's order.

    extractor and head partition the parameters, head being the layer that gives the classes; norm holds parameters
    and buffers of the normalisation layers; buffers all buffers. U-shaped networks also have encoder and decoder,
    which partition the extractor.

    Raises:
        ConfigError: A network of a class that is not in `MODELS`.
    """
    names = [kind.__name__ for kind in type(network).__mro__]
    for family in MODELS.values():
        if family.network in names:
            return family.groups(network)
    raise ConfigError(
        f"The parameter groups of a {type(network).__name__} are not known; known are those of "
        f"{', '.join(MODELS)}. Build the network with common.models.build_model."
    )


def template(network: nn.Module) -> Tensors:
    """Return names, shapes and dtypes of a network's state dict as "meta" tensors, which take no memory."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in network.state_dict().items()}
