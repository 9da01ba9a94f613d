"""How large may a model be? One round with one site and a model of the given size: seconds, and peak memory of each process.

.venv/bin/python -m tests.bench.large [--gb 0.5 1 2] [--transport memory]

The network is an MLP with two hidden layers as wide as the size asks for; the work on it is small, so the time is transport.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.events import read_events
from ops.options import Options
from ops.trial import run_trial
from tests.bench.environment import write
from tests.harness import write_table_site


def main(argv: list[str]) -> None:
    """Measure and write build/bench/large.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[0.1, 0.5, 1.0, 2.0])
    parser.add_argument("--transport", choices=("memory", "file"), default="memory")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="wr-bench-"))
    data = folder / "data"
    write_table_site(data / "hospital-1", seed=0)
    (data / "federation.json").write_text(json.dumps({"name": "tiny", **SETTINGS}))
    found = [measure(folder, data, size, arguments.transport) for size in arguments.gb]
    print(write("large" if arguments.transport == "memory" else "large-file", {"rows": found}))


SETTINGS = {
    "data": {
        "task": "tabular", "spatial_dims": 0, "channels": ["a", "b", "c"], "labels": ["well", "ill"], "patch": [],
    },
    "model": {"name": "mlp"},
    "train": {"optimizer": "sgd", "momentum": 0.0, "lr": 1e-4, "batch_size": 32},
    "rounds": {"rounds": 1, "deadline": 1500.0},
}  # fmt: skip


def measure(folder: Path, data: Path, size: float, transport: str) -> dict[str, Any]:
    """Run one round with a model of some GB and return its figures."""
    width = int(math.sqrt(size * 1e9 / 4))
    out = folder / f"run-{size:g}"
    options = Options("fedavg", str(data), rounds=1, out=out, settings=(f"hidden=[{width},{width}]",))
    code = run_trial(options, transport="file" if transport == "file" else "memory")
    events = [event for path in sorted(out.glob("events*.jsonl")) for event in read_events(path)]
    ends = [event for event in events if event["event"] == "round.end"]
    peaks: dict[str, float] = {}
    for event in events:
        if event["event"] == "memory":
            peaks[event["name"]] = max(peaks.get(event["name"], 0.0), event["peak"])
    local = next((event["phases"] for event in events if event["event"] == "site.reply"), {})
    row = {
        "gb": size, "transport": transport, "code": code, "width": width,
        "round_s": next((event["seconds"] for event in ends if not event["closing"]), None),
        "local_s": {name: round(value, 1) for name, value in local.items()},
        "closing_s": next((event["seconds"] for event in ends if event["closing"]), None),
        "retries": sum(event["event"] in ("site.retry", "process.restart") for event in events),
        "peak_mb": {name: round(value) for name, value in sorted(peaks.items())},
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
