"""State on disk: safetensors and JSON, written whole or not at all.

A state is a folder with `state.safetensors`, `state.json` and `manifest.json` (sizes and SHA-256 of both, versions).
It is written beside its place and renamed into it, so a reader finds the old one or the new one, never half of either.
(Between the two renames of a replacement the old one lies beside its place; a reader looks there, too.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

import common
from common.errors import PayloadError, StorageError
from common.payload import State, Tensors

STORE_SCHEMA = 1
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SAVED = re.compile(r"(?:round-(\d{6,})|\.round-(\d{6,})\.old)")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably.

    Raises:
        StorageError: The volume is full or cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_through(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Turn what a volume complains of into an error that may cross the border."""
    try:
        yield
    except OSError as error:
        reason = (
            "it is full"
            if error.errno in FULL
            else f"{errno.errorcode.get(error.errno or 0, 'unknown error')}"
        )
        raise StorageError(
            f"The volume cannot be written ({reason}); what was saved before is untouched. Free space or mend it, "
            "then go on.", detail=str(error),
        ) from error  # fmt: skip


def tensor_bytes(tensors: Tensors, notes: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as safetensors bytes. Same tensors, same bytes.

    Notes go into one metadata entry as sorted JSON: safetensors keeps metadata in no fixed order.
    """
    own: Tensors = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses shared memory; what is not shared is not copied, a large model is here once
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        own[name] = tensor.clone() if shared else tensor
        seen.add(storage.data_ptr())
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

    Raises:
        StorageError: The volume is full or cannot be written; what was there stays.
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
    with storing():
        _replace_folder(folder, files)
    return sum(len(data) for data in files.values())


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, data in files.items():
            _write_through(temporary / name, data)
        _sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(_old(folder), ignore_errors=True)
            os.replace(folder, _old(folder))
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(_old(folder), ignore_errors=True)


def read_state(folder: Path) -> State:
    """Read a state folder and check it against its manifest.

    Raises:
        PayloadError: Missing, incomplete, altered, or of another schema.
    """
    if not folder.exists() and _old(folder).exists():
        folder = _old(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = {name: (folder / name).read_bytes() for name in ("state.safetensors", "state.json")}
        if not isinstance(manifest, dict):
            raise ValueError("the manifest is no JSON object")
    except (OSError, ValueError) as error:
        raise PayloadError(
            "A saved state is missing or incomplete; it cannot be continued from.", detail=str(folder)
        ) from error
    if manifest.get("schema") != STORE_SCHEMA:
        raise PayloadError(
            f"A saved state has schema {manifest.get('schema')}, this software reads {STORE_SCHEMA}.",
            detail=str(folder),
        )
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != _noted_sha256(manifest, name):
            raise PayloadError(
                f"A saved state does not match its checksum ({name}); it was altered or cut.",
                detail=str(folder),
            )
    tensors: dict[str, Tensor] = load(files["state.safetensors"])
    return State(tensors, json.loads(files["state.json"]))


def state_folder(parent: Path, round_: int) -> Path:
    """Return where the state after a round lies."""
    return parent / f"round-{round_:06d}"


def saved_rounds(parent: Path) -> list[int]:
    """Return the rounds that have a state under a folder, ascending."""
    if not parent.is_dir():
        return []
    found = (_SAVED.fullmatch(entry.name) for entry in parent.iterdir())
    return sorted({int(match[1] or match[2]) for match in found if match})


def keep_rounds(parent: Path, round_: int, count: int) -> None:
    """Keep the newest states up to a round; older ones go, and later ones (of an abandoned continuation).

    Args:
        parent: Folder of the states.
        round_: The round that was written last.
        count: How many stay.
    """
    rounds = saved_rounds(parent)
    kept = [number for number in rounds if number <= round_][-count:]
    for number in rounds:
        if number not in kept:
            _drop(state_folder(parent, number))


def _drop(folder: Path) -> None:
    """Remove a state and what interrupted writes of it left; renamed first, so that no half of it is ever found."""
    trash = folder.with_name(f".{folder.name}.trash")
    for path in (_old(folder), folder):
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.replace(path, trash)
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _noted_sha256(manifest: dict[str, Any], name: str) -> str | None:
    files = manifest.get("files")
    entry = files.get(name) if isinstance(files, dict) else None
    return entry.get("sha256") if isinstance(entry, dict) else None


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
