"""What the uplink's settings do to one change of a small network: bytes, runs, and how much of it is lost.

    .venv/bin/python -m tests.bench.squeeze

The change is that of a U-shaped network after 48 steps of Adam on synthetic pictures whose label is a threshold. One round, no
feedback: lost is ‖A - T‖² / ‖A‖². The figures are those of docs/wire.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.codecs import CODECS
from common.config import RunConfig, WireConfig
from common.models import build_model
from common.squeeze import BYTES, Change, squeezed
from tests.bench.environment import write

STEPS, BATCH, SIDE = 48, 4, 64
SETTINGS: tuple[dict[str, Any], ...] = (
    *({"uplink_codec": "cer", "gamma": gamma} for gamma in (0.0, 1e-3, 3e-3, 0.01, 0.03, 0.1)),
    *({"uplink_codec": "cer-bf16", "gamma": gamma} for gamma in (1e-3, 0.01)),
    *({"uplink_codec": "stc", "uplink_p": p} for p in (0.2, 0.01)),
    *(
        {"uplink_codec": "cer-stc", "uplink_p": p, "gamma": gamma}
        for p in (0.2, 0.01)
        for gamma in (0.0, 1e-3, 0.01, 0.1)
    ),
)


def trained() -> dict[str, Tensor]:
    """Return the change of the network's parameters."""
    data = {"task": "segmentation", "spatial_dims": 2, "patch": (SIDE, SIDE), "channels": ("a",)}
    config = RunConfig.from_mapping({"data": data})
    network = build_model(config.model, config.data, seed=0)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(1)
    pictures = torch.randn(16 * BATCH, 1, SIDE, SIDE, generator=rng)
    pictures = torch.nn.functional.avg_pool2d(pictures, 5, 1, 2)
    labels = (pictures[:, 0] > 0.05).long()
    for step in range(STEPS):
        chosen = slice(step * BATCH % len(pictures), step * BATCH % len(pictures) + BATCH)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(pictures[chosen]), labels[chosen]).backward()
        optimizer.step()
    return {name: value.detach() - before[name] for name, value in network.named_parameters()}


def energy(tensors: dict[str, Tensor]) -> float:
    """Return the squared L2 norm in float64."""
    return sum(float(value.double().square().sum()) for value in tensors.values())


def main() -> None:
    """Measure and write build/bench/squeeze.json."""
    torch.set_num_threads(1)
    A = trained()
    n = sum(value.numel() for value in A.values())
    print(
        f"{n} parameters in {len(A)} tensors\n{'codec':10} {'gamma':>6} {'p':>5} {'bytes':>7} ratio   runs    lost"
    )
    rows = []
    for settings in SETTINGS:
        config = WireConfig(**settings)
        T = squeezed(Change(A, {}, {}), config, config.gamma).coded
        size = len(CODECS[BYTES[config.uplink_codec]].encode(T))
        starts = sum(1 + int((value.flatten()[1:] != value.flatten()[:-1]).sum()) for value in T.values())
        row = {
            **settings, "bytes": size, "ratio": 4 * n / size, "runs": starts / n,
            "lost": energy({name: A[name] - T[name] for name in A}) / energy(A),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{config.uplink_codec:10} {settings.get('gamma', ''):>6} {settings.get('uplink_p', ''):>5} {size:7d} "
            f"{row['ratio']:5.1f} {row['runs']:.4f} {row['lost']:.3f}"
        )
    print(write("squeeze", {"parameters": n, "tensors": len(A), "settings": rows}))


if __name__ == "__main__":
    main()
