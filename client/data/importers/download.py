"""Downloading a task of the Medical Segmentation Decathlon.

Addresses and checksums are MONAI's own (`DecathlonDataset`). The transfer is done here, for three reasons: MONAI's goes
through the system's temporary folder, which is often too small for an archive of many gigabytes; it shows its progress
only if tqdm is installed; and it says with a path and a URL what went wrong.
"""

from __future__ import annotations

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from client.data.importers.layout import Progress
from common.errors import ConfigError, DataError, nearest

CHUNK = 1 << 20
SECONDS = 60.0  # without a byte
SOURCE = "Medical Segmentation Decathlon, CC-BY-SA 4.0 (Simpson et al. 2019)"


def tasks() -> dict[str, tuple[str, str]]:
    """Return address and MD5 checksum by task name, as MONAI has them."""
    from monai.apps import DecathlonDataset

    return {name: (url, DecathlonDataset.md5[name]) for name, url in DecathlonDataset.resource.items()}


def find_name(text: str) -> str:
    """Return the full name of a task: "Task04_Hippocampus" for that, "Task04", "04", "4" or "hippocampus".

    Raises:
        ConfigError: Unknown; with the nearest known one.
    """
    wanted = text.strip().lower()
    known = tasks()
    for name in known:
        number, _, organ = name.lower().partition("_")
        if wanted in (name.lower(), number, number.removeprefix("task"), organ) or (
            wanted.isdigit() and int(wanted) == int(number.removeprefix("task"))
        ):
            return name
    raise ConfigError(f"Task '{text}' is unknown. {nearest(text, known)}")


def download(task: str, out: Path, progress: Progress) -> Path:
    """Download a task's archive and check it; `msd` imports the archive as it is.

    Args:
        task: As `find_name` takes it.
        out: Folder to put the archive into; made if absent.
        progress: Called with bytes done and in all.

    Returns:
        The archive. If it was there and is right, nothing is downloaded.

    Raises:
        ConfigError: Unknown task.
        DataError: No network, a refusing server, a broken transfer, or a wrong checksum.
    """
    name = find_name(task)
    url, checksum = tasks()[name]
    target = out / f"{name}.tar"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if target.exists():
            _verify_existing(target, checksum)
            return target
        partial = out / f".{name}.tar.part"
        try:
            _fetch(url, partial, checksum, name, progress)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except HTTPError as error:
        raise DataError(
            f"The server refused the download of {name} (HTTP {error.code}). Try later, or get the archive from "
            "medicaldecathlon.com and import it.",
            detail=f"{url}: {error}",
        ) from error
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise DataError(
            f"{name} cannot be downloaded: there is no connection, or it broke. Check network and proxy (HTTPS_PROXY), or "
            "bring the archive from another machine and import it.",
            detail=f"{url}: {error}",
        ) from error
    except OSError as error:
        raise DataError(
            f"The archive cannot be written ({error.strerror}). Give an OUT with enough space that this account may write.",
            detail=str(error),
        ) from error
    return target


def _fetch(url: str, partial: Path, checksum: str, name: str, progress: Progress) -> None:
    digest = hashlib.md5(usedforsecurity=False)  # finds broken transfers; the address is HTTPS
    done = 0
    with urlopen(url, timeout=SECONDS) as response, partial.open("wb") as stream:
        total = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(CHUNK):
            stream.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(name, done, max(total, done))
    if done < total:
        raise ConnectionError(f"{done} of {total} bytes")
    if digest.hexdigest() != checksum:
        raise DataError(
            f"The checksum of {name} is not the expected one, so it was thrown away. Download it again; if it stays so, the "
            "file behind the address has changed.",
            detail=f"md5 {digest.hexdigest()}, expected {checksum}",
        )


def _verify_existing(target: Path, checksum: str) -> None:
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != checksum:
        raise DataError(
            f"OUT has an archive {target.name} whose checksum is not the expected one. Remove it, and start again.",
            detail=f"{target}: md5 {found}, expected {checksum}",
        )
