"""A startup kit as one file to be sent: the same files give the same bytes."""

from __future__ import annotations

import datetime
import io
import tarfile
from collections.abc import Mapping
from gzip import GzipFile
from pathlib import Path


def pack(name: str, files: Mapping[str, bytes], moment: datetime.datetime) -> bytes:
    """Return a .tar.gz of one folder: same files, same bytes; private modes, no owner's name.

    Args:
        name: The folder's.
        files: Bytes by relative name.
        moment: Time of every entry.
    """
    stamp, buffer = int(moment.timestamp()), io.BytesIO()
    with (
        GzipFile(filename="", fileobj=buffer, mode="wb", mtime=stamp) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        folders = {name, *(f"{name}/{Path(file).parent}" for file in files if "/" in file)}
        for folder in sorted(folders):
            tar.addfile(_entry(folder, stamp, tarfile.DIRTYPE, 0o700))
        for file in sorted(files):
            entry = _entry(f"{name}/{file}", stamp, tarfile.REGTYPE, 0o600)
            entry.size = len(files[file])
            tar.addfile(entry, io.BytesIO(files[file]))
    return buffer.getvalue()


def _entry(name: str, stamp: int, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, stamp
    return entry
