"""What a row of the models' table is, and the checks that several families share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from common.config import DataConfig, ModelConfig, TaskName
from common.errors import ConfigError
from common.method import Groups


@dataclass(frozen=True)
class Family:
    """A kind of network.

    Attributes:
        name: What `model.name` takes.
        module: File with `build(model, data)` and `groups(network)`; imported when first needed, because MONAI
            takes seconds to import and a run over tables does without it.
        network: Name of the class that `build` returns.
        tasks: Tasks it is for.
        default_for: Tasks whose "auto" it is.
    """

    name: str
    module: str
    network: str
    tasks: tuple[TaskName, ...]
    default_for: tuple[TaskName, ...] = ()

    def build(self, model: ModelConfig, data: DataConfig) -> nn.Module:
        """Build the network with torch's global generator.

        Raises:
            ConfigError: A setting that it cannot honour.
        """
        network: nn.Module = importlib.import_module(self.module).build(model, data)
        return network

    def groups(self, network: nn.Module) -> Groups:
        """Return the parameter groups of a network of this family."""
        groups: Groups = importlib.import_module(self.module).groups(network)
        return groups


def check_task(family: Family, data: DataConfig, families: Iterable[Family]) -> None:
    """Refuse a network that is for another task.

    Raises:
        ConfigError: Naming the networks that are for this task.
    """
    if data.task not in family.tasks:
        fitting = [other.name for other in families if data.task in other.tasks]
        raise ConfigError(
            f"Model '{family.name}' is for {' and '.join(family.tasks)}, the run's task is {data.task}. "
            f"Choose {' or '.join(fitting)}, or 'auto'."
        )


def check_halvings(name: str, model: ModelConfig, data: DataConfig) -> None:
    """Check that a U-shaped network can halve the patch at every level but the last.

    Raises:
        ConfigError: A patch size that is no multiple of 2^(levels-1), or too small for the normalisation.
    """
    factor = 2 ** (model.levels - 1)
    if any(size % factor for size in data.patch):
        raise ConfigError(
            f"Model '{name}' with {model.levels} levels needs patch sizes that are multiples of {factor}, "
            f"got {list(data.patch)}. Change data.patch or model.levels."
        )
    grid = [size // factor for size in data.patch]
    check_coarsest(name, model, data, grid, refused=("instance", "batch"))


def check_coarsest(
    name: str, model: ModelConfig, data: DataConfig, grid: list[int], refused: tuple[str, ...]
) -> None:
    """Check that the coarsest grid has more than one voxel, where a normalisation needs statistics over it.

    Args:
        name: The model.
        model: Its settings.
        data: The run's patch.
        grid: Sizes of the coarsest grid.
        refused: Normalisations that cannot do with one voxel.

    Raises:
        ConfigError: One of them over a single voxel.
    """
    if math.prod(grid) < 2 and model.norm in refused:
        raise ConfigError(
            f"Model '{name}' brings a patch of {list(data.patch)} down to a single voxel, over which "
            f"'{model.norm}' normalisation has no statistics. Use a larger data.patch, or model.norm 'group'."
        )
