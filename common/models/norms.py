"""The run's normalisation in MONAI's words."""

from __future__ import annotations

import math
from typing import Any

from common.config import ModelConfig

NormSpec = str | tuple[str, dict[str, Any]]
MOST_GROUPS = 8


def norm_spec(model: ModelConfig, *channels: int, most_groups: int = MOST_GROUPS) -> NormSpec:
    """Return MONAI's description of the normalisation that `model.norm` names.

    Instance and group normalisation get trainable scales and shifts, so that they can be kept local. Group
    normalisation takes as many groups as divide all channel counts, `most_groups` at most.

    Args:
        model: The run's model settings, with "auto" resolved.
        channels: Channel counts that are normalised somewhere in the network.
        most_groups: Bound on the number of groups.

    Returns:
        Name and arguments; "" for none.
    """
    if model.norm == "none":
        return ""
    if model.norm == "group":
        return "group", {"num_groups": math.gcd(most_groups, *channels)}
    return model.norm, {"affine": True}
