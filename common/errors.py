"""The errors of wardround: each has a code, a sentence that may cross the border, and a private detail.

    WardroundError            code "internal", exit 1
    ├── ConfigError           a key, value or combination in a configuration          exit 2
    ├── DataError             a case, split or table of a site                        exit 3
    ├── PayloadError          what travelled: schema, names, shapes, dtypes, values   exit 4
    ├── MismatchError         two ends that do not fit: version, labels, channels     exit 5
    ├── PolicyError           the hospital's policy forbids it                        exit 6
    ├── WorkerError           the worker is not there, or a call to it broke          exit 7
    ├── QuorumError           too few sites contributed                               exit 8
    ├── ProcessError          a process of the trial ended or never became ready      exit 9
    ├── CredentialError       a key or certificate that does not match                exit 10
    ├── CancelledError        the work was cancelled from outside                     exit 11
    ├── TrainingError         local training went wrong (loss not finite)             exit 12
    ├── StorageError          a volume is full or cannot be written                   exit 13
    ├── LedgerError           a ledger is changed, cut, or cannot be continued        exit 14
    └── BaseLostError         a site no longer holds the model that a change is for   exit 15

`str(error)` is the safe sentence: it names site and case by alias only, never a path, a file name, a header
value or the text of a foreign exception. What a person at the hospital needs beside it goes into `detail`,
which stays in the hospital's own log and on its own terminal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

VERDICT = "wardround: "
"""Begins the last line of a process that ends by an error of its own: the safe sentence, for whoever supervises it."""


class WardroundError(Exception):
    """Base of all errors that wardround raises on purpose.

    Args:
        message: Safe sentence: what was expected, what was got, what to do. No path, no identifier.
        detail: Private text for the local log or terminal (paths, original exception); never travels.
        site: Alias of the site concerned, if one is.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, detail: str = "", site: str = "") -> None:
        # What the other end wrote may hold what no text can (a lone surrogate), and no log or wire takes.
        message = message.encode(errors="backslashreplace").decode()
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.site = site


class ConfigError(WardroundError):
    """A configuration key, value or combination that cannot be used."""

    code = "config"
    exit_code = 2


class DataError(WardroundError):
    """A site's case, split, table or description that cannot be used."""

    code = "data"
    exit_code = 3


class PayloadError(WardroundError):
    """What travelled does not have the declared schema, names, shapes, dtypes or values."""

    code = "payload"
    exit_code = 4


class MismatchError(WardroundError):
    """The two ends do not fit: schema version, labels, channels, spacing policy, method."""

    code = "mismatch"
    exit_code = 5


class PolicyError(WardroundError):
    """The hospital's policy forbids what was asked."""

    code = "policy"
    exit_code = 6


class WorkerError(WardroundError):
    """The worker is not there, or a call to it broke."""

    code = "worker"
    exit_code = 7


class QuorumError(WardroundError):
    """Too few sites contributed to a round."""

    code = "quorum"
    exit_code = 8


class ProcessError(WardroundError):
    """A process of the trial ended, or did not become ready in time."""

    code = "process"
    exit_code = 9


class CredentialError(WardroundError):
    """A key, certificate or secret that does not match or cannot be read."""

    code = "credential"
    exit_code = 10


class CancelledError(WardroundError):
    """The work was cancelled from outside (a relay that went away, a deadline, Ctrl-C)."""

    code = "cancelled"
    exit_code = 11


class TrainingError(WardroundError):
    """Local training went wrong: the loss is not a finite number."""

    code = "training"
    exit_code = 12


class StorageError(WardroundError):
    """A volume is full, or cannot be written or read."""

    code = "storage"
    exit_code = 13


class LedgerError(WardroundError):
    """A hospital's ledger is changed, cut short, or cannot be continued."""

    code = "ledger"
    exit_code = 14


class BaseLostError(WardroundError):
    """A site does not hold the model that a change was sent for; it needs the whole model."""

    code: ClassVar[str] = "base"
    exit_code: ClassVar[int] = 15


def safe_sentence(error: BaseException) -> tuple[str, str]:
    """Return (code, sentence) of any exception in a form that may cross the border.

    A foreign exception gives its class name alone: its text may carry paths or identifiers.
    """
    if isinstance(error, WardroundError):
        return error.code, error.message
    return "internal", f"unexpected {type(error).__name__}; the full text is in the site's own worker log"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint `did you mean 'x'? Known: a, b.` for an unknown name.

    Args:
        name: What the user wrote.
        known: The names that exist.
    """
    names = sorted(known)
    close = difflib.get_close_matches(
        name.lower().replace("_", "-"), [n.lower().replace("_", "-") for n in names], n=1, cutoff=0.5
    )
    hint = ""
    if close:
        original = next(n for n in names if n.lower().replace("_", "-") == close[0])
        hint = f"Did you mean '{original}'? "
    return f"{hint}Known: {', '.join(names) if names else 'none'}."
