"""State on disk: safetensors and JSON, written whole or not at all.

A state is a folder with `state.safetensors`, `state.json` and `manifest.json` (sizes and SHA-256 of both, versions).
It is written beside its place and renamed into it, so a reader finds the old one or the new one, never half of either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

import common
from common.errors import PayloadError
from common.payload import State, Tensors

STORE_SCHEMA = 1


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def tensor_bytes(tensors: Tensors, notes: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as safetensors bytes. Same tensors, same bytes.

    Notes go into one metadata entry as sorted JSON: safetensors keeps metadata in no fixed order.
    """
    own = {name: tensors[name].contiguous().clone() for name in sorted(tensors)}  # safetensors refuses shared memory
    metadata = {"wardround": json.dumps(notes, sort_keys=True)} if notes else None
    return save(own, metadata=metadata)


def write_tensors(path: Path, tensors: Tensors, notes: Mapping[str, str] | None = None) -> int:
    """Write a safetensors file atomically and return its size in bytes."""
    data = tensor_bytes(tensors, notes)
    write_bytes(path, data)
    return len(data)


def write_state(folder: Path, state: State) -> int:
    """Write a state folder atomically, replacing one that is there.

    Returns:
        Bytes written.
    """
    files = {
        "state.safetensors": tensor_bytes(state.tensors),
        "state.json": json.dumps(state.values, sort_keys=True).encode(),
    }
    manifest = {
        "schema": STORE_SCHEMA,
        "software": common.__version__,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    files["manifest.json"] = json.dumps(manifest, sort_keys=True, indent=1).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, data in files.items():
        with (temporary / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, folder)
    return sum(len(data) for data in files.values())


def read_state(folder: Path) -> State:
    """Read a state folder and check it against its manifest.

    Raises:
        PayloadError: Missing, incomplete, altered, or of another schema.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {name: (folder / name).read_bytes() for name in ("state.safetensors", "state.json")}
    except (OSError, json.JSONDecodeError) as error:
        raise PayloadError(
            "A saved state is missing or incomplete; it cannot be continued from.", detail=str(folder)
        ) from error
    if manifest.get("schema") != STORE_SCHEMA:
        raise PayloadError(
            f"A saved state has schema {manifest.get('schema')}, this software reads {STORE_SCHEMA}.",
            detail=str(folder),
        )
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != manifest.get("files", {}).get(name, {}).get("sha256"):
            raise PayloadError(
                f"A saved state does not match its checksum ({name}); it was altered or cut.",
                detail=str(folder),
            )
    tensors: dict[str, Tensor] = load(files["state.safetensors"])
    return State(tensors, json.loads(files["state.json"]))
