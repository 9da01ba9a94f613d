"""What a figure was measured on, and where figures are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from ops.plan import versions

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "bench"


def environment() -> dict[str, Any]:
    """Return versions, processor, memory and device of this machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "versions": versions(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "machine": platform.machine(),
        "system": platform.system(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "commit": commit.stdout.strip(),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write one benchmark's figures with the environment beside them."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(
        json.dumps({"benchmark": name, "environment": environment(), "figures": figures}, indent=2) + "\n"
    )
    return path


def tiny_data(folder: Path, *, sites: int = 3) -> Path:
    """Write (once) the tiny default data that e2e tests and overhead benchmarks use."""
    from client.data.mni import write_mni_trial

    if not (folder / "federation.json").is_file():
        write_mni_trial(folder, sites=sites, subjects=3, seed=0, voxel_mm=8.0)
    return folder
