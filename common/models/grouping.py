"""Parameter groups from a network's module names."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from common.method import Groups

# _NormBase is batch and instance normalisation of any dimension
NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def make_groups(network: nn.Module, *, head: tuple[str, ...], encoder: tuple[str, ...] = ()) -> Groups:
    """Return a network's groups.

    Args:
        network: The network.
        head: Names of the modules that make up the head.
        encoder: Names of the encoder's modules; the rest of the extractor is the decoder. Empty for a network
            that is not U-shaped.

    Returns:
        Groups with state-dict keys in the state dict's order.
    """
    parameters = [name for name, _ in network.named_parameters()]
    keys = list(network.state_dict())
    extractor = [name for name in parameters if not _under(name, head)]
    normal = [name for name, module in network.named_modules() if isinstance(module, NORM_LAYERS)]
    names = {
        "extractor": tuple(extractor),
        "head": tuple(name for name in parameters if _under(name, head)),
        "norm": tuple(key for key in keys if _under(key, tuple(normal))),
        "buffers": tuple(key for key in keys if key not in set(parameters)),
    }
    if encoder:
        names["encoder"] = tuple(name for name in extractor if _under(name, encoder))
        names["decoder"] = tuple(name for name in extractor if not _under(name, encoder))
    return Groups(names)


def _under(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
