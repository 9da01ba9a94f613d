"""Files and words shared by provisioning: private folders, errors of a volume, addresses, fingerprints, a lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigError, CredentialError, StorageError
from ops.pki_issue import write_private

LARGEST = 1 << 20  # bytes of a file of a kit or of a request; ours have a few thousand
SHORT = 32  # hexadecimal digits read on the telephone: 128 bits, which nobody can aim at
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn what a volume complains of into a StorageError with a safe sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The folder cannot be written ({error.strerror or 'unknown reason'}). Free space or mend its rights, "
            "then run the command again.", detail=str(error),
        ) from error  # fmt: skip


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can enter (mode 0700), with its parents; one that is there is narrowed."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def write(path: Path, content: bytes) -> Path:
    """Write a private file (mode 0600) in one step, and make its name durable.

    Raises:
        StorageError: The volume cannot be written; what was there stays.
    """
    with writing():
        write_private(path, content)
        sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_limited(path: Path, what: str) -> bytes:
    """Return a file's bytes.

    Args:
        path: The file; a link is not followed.
        what: What it is, for the sentence.

    Raises:
        CredentialError: Missing, not a plain file, too large, or unreadable.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise CredentialError(
            f"{what} cannot be read ({error.strerror or 'unknown reason'}): check that it is there, a plain file, and "
            "yours to read.", detail=f"{path}: {error}",
        ) from error  # fmt: skip
    if len(content) > LARGEST:
        raise CredentialError(
            f"{what} is larger than 1 MiB, which none is: ask for it again.", detail=str(path)
        )
    return content


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a project's folder: two commands at once would lose what one of them wrote.

    Raises:
        ConfigError: Another command works on it.
        StorageError: The folder cannot be written.
    """
    with writing():
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "Another command works on this project: wait for its end, then run this again."
            ) from error
        yield
    finally:
        os.close(handle)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def spoken(fingerprint: str) -> str:
    """Return the part of a fingerprint that people compare, in groups of four digits."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, SHORT, 4))


def same_fingerprint(said: str, fingerprint: str) -> bool:
    """Return whether what was read out is this fingerprint.

    Args:
        said: At least the eight groups of `spoken`; blanks, colons, dashes and capitals do not matter.
        fingerprint: 64 hexadecimal digits.

    Raises:
        ConfigError: Too few digits, or something else than digits: nothing could be compared.
    """
    digits = re.sub(r"[\s:-]", "", said).lower()
    if not re.fullmatch(rf"[0-9a-f]{{{SHORT},64}}", digits):
        raise ConfigError(
            f"A fingerprint has at least {SHORT} hexadecimal digits (0-9, a-f; eight groups of four), got {len(digits)} "
            "characters that are not all such digits or too few: give all of them."
        )
    return fingerprint.startswith(digits)


def check_host(name: str) -> str:
    """Return a host name or address as it is compared: lower case, addresses in their normal form.

    Raises:
        ConfigError: It is neither.
    """
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _HOST.fullmatch(name) or name.replace(".", "").isdecimal():
        raise ConfigError(
            f"{name[:80]!r} is neither a host name nor an address: expected e.g. fl.example.org or 192.0.2.7, without "
            "'https://' and without a port."
        )
    return name.lower()


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int | None]:
    """Return the host and, if one is given, the port of HOST, HOST:PORT, ADDRESS, [ADDRESS] or [ADDRESS]:PORT.

    Raises:
        ConfigError: Anything else.
    """
    match = re.fullmatch(r"\[([^]]*)\](?::([0-9]{1,5}))?", text)
    if match is None and text.count(":") <= 1:
        match = re.fullmatch(r"([^:]*)(?::([0-9]{1,5}))?", text)
    host, port = (match[1], match[2]) if match else (text, None)
    if port is not None and not 1 <= int(port) <= 65535:
        raise ConfigError(f"Port {port} is not between 1 and 65535.")
    return check_host(host), int(port) if port is not None else None
