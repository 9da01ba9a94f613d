"""The lines of a ledger: their schema, their canonical bytes, and the reader that proves a chain of them.

Nothing here writes. client/ledger.py has the file and says what it is for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from common.errors import LedgerError, StorageError

LEDGER_FILE, HEAD_FILE, LOCK_FILE = "ledger.jsonl", "ledger.head", "ledger.lock"
RECOVERED = "recovered"
ZERO = "0" * 64
MAX_SHAPES = 64  # tensor names kept with an entry; the others are counted in `tensors`
MAX_DIMS = 64
MAX_NAME = 128
MAX_REASON = 1000
MAX_LINE = 1 << 20  # far above what the limits above can make; a longer line is none of ours
_MAX_INT = (1 << 63) - 1
_MAX_HEAD = 256
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_HEAD = re.compile(r"([0-9]{1,18}):([0-9a-f]{64})", re.ASCII)
KEEP = "Keep the ledger and its head file for the data-protection officer; a new ledger begins once both are moved away."
_FAULTS = {
    errno.ENOSPC: "no space is left on its volume",
    errno.EDQUOT: "the quota of its volume is used up",
    errno.EFBIG: "it would pass the file size limit",
    errno.EROFS: "its volume is read-only",
    errno.EIO: "its volume reports a fault",
    errno.EACCES: "this user may not",
    errno.EPERM: "this user may not",
}


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters")
    return text


Phase = Literal["hello", "round", "closing", "ping"]
Direction = Literal["in", "out"]
Decision = Literal["released", "received", "refused"]
Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
Printable = Annotated[str, AfterValidator(_printable)]  # a terminal obeys control characters
Name = Annotated[Printable, StringConstraints(max_length=MAX_NAME)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Norm = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Entry(BaseModel):
    """One line of the ledger: one part of one message.

    Attributes:
        n: Number of the line, from 1.
        time: When it was written, UTC ("2026-01-01T12:00:00.123Z").
        run: Identifier of the run.
        round: Round, 0 where the message belongs to none.
        phase: What the message was for.
        direction: "in" (came to the site) or "out" (left it).
        part: Payload's name, or metrics, summary, figures, config, failure, recovered.
        kind: Payload's kind, or the same word.
        tensors: How many tensors.
        shapes: Shapes by tensor name, `MAX_SHAPES` at most.
        bytes: Size of the part.
        sha256: Of the part's bytes.
        norm: L2 norm over all floating tensors, where it is a finite number.
        cases: Training cases behind it.
        decision: What the site decided.
        reason: Empty, or a code and a safe sentence.
        prev: Hash of the line before; 64 zeros in the first.
        hash: SHA-256 of the canonical JSON of all the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n: Annotated[int, Field(ge=1, le=_MAX_INT)]
    time: Annotated[
        str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$")
    ]
    run: Name
    round: Count
    phase: Phase
    direction: Direction
    part: Name
    kind: Name
    tensors: Count
    shapes: Annotated[
        dict[Name, Annotated[list[Count], Field(max_length=MAX_DIMS)]], Field(max_length=MAX_SHAPES)
    ]
    bytes: Count
    sha256: Sha256
    norm: Norm | None
    cases: Count | None
    decision: Decision
    reason: Annotated[Printable, StringConstraints(max_length=MAX_REASON)]
    prev: Sha256
    hash: Sha256


@dataclass(frozen=True)
class Record:
    """What the caller says about one part; the ledger adds number, time and chain. See `Entry` for the fields."""

    part: str
    kind: str
    bytes: int
    sha256: str
    tensors: int = 0
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    norm: float | None = None
    cases: int | None = None
    decision: Decision = "released"
    reason: str = ""


@dataclass(frozen=True)
class Head:
    """A head, and who says so.

    Attributes:
        n: Number of the last entry.
        hash: Its hash.
        source: "its head file" or "the head noted elsewhere", for sentences.
    """

    n: int
    hash: str
    source: str


class Scan:
    """Reads a ledger once from its beginning and yields its entries, each proved against the one before it.

    Memory does not grow with the file. At the end the heads are compared.

    Args:
        stream: The ledger, at its beginning.
        path: Where it lies, for the local detail of an error.
        site: Alias, for sentences.
        heads: Heads that the chain must have.

    Attributes:
        count: Entries so far.
        hash: Of the last one.
        good: Bytes of whole lines so far.
        tail: Bytes after the last whole line (a torn line), at the end.
    """

    def __init__(self, stream: BinaryIO, path: Path, site: str = "", heads: Sequence[Head] = ()) -> None:
        self.count, self.hash, self.good, self.tail = 0, ZERO, 0, b""
        self._stream, self._path, self._site = stream, path, site
        self._heads = heads

    def __iter__(self) -> Iterator[Entry]:
        self._compare()
        while line := self._stream.readline(MAX_LINE + 1):
            if not line.endswith(b"\n"):
                if len(line) > MAX_LINE:
                    raise self._wrong("is not a ledger line: it is too long")
                self.tail = line
                break
            entry = self._entry(line)
            self.count, self.hash, self.good = entry.n, entry.hash, self.good + len(line)
            self._compare()
            yield entry
        for head in self._heads:
            if head.n > self.count:
                raise cut_short(self._site, head, self.count, self._path)

    def _entry(self, line: bytes) -> Entry:
        try:
            found = json.loads(line)
            entry = Entry.model_validate(found)
        except (ValueError, RecursionError) as error:
            raise self._wrong(
                "is not a ledger line: it does not have the ledger's keys and values"
            ) from error
        body = {key: value for key, value in found.items() if key != "hash"}
        if canonical(found) + b"\n" != line or hashlib.sha256(canonical(body)).hexdigest() != entry.hash:
            raise self._wrong("was changed: its content does not have its hash")
        if entry.n != self.count + 1:
            raise self._wrong(
                f"is out of order or lines before it were removed: it carries the number {entry.n}"
            )
        if entry.prev != self.hash:
            raise self._wrong(
                "is out of order, or a line before it was changed, removed or put in: it does not carry the hash "
                "of the line before"
            )
        return entry

    def _compare(self) -> None:
        for head in self._heads:
            if head.n == self.count and head.hash != self.hash:
                raise ledger_error(
                    self._site,
                    f"line {head.n} of the ledger was changed, or all lines were written anew: {head.source} gives "
                    f"it another hash. {KEEP}",
                    self._path,
                )

    def _wrong(self, what: str) -> LedgerError:
        return ledger_error(self._site, f"line {self.count + 1} of the ledger {what}. {KEEP}", self._path)


def make_entry(fixed: dict[str, Any], record: Record, site: str = "") -> tuple[Entry, bytes]:
    """Return the entry of a record and its line.

    Names and reason are cut and made printable; a norm that is not finite becomes None.

    Args:
        fixed: The fields that the record does not have, but `hash`.
        record: The part.
        site: Alias, for sentences.

    Raises:
        LedgerError: A value that the schema does not allow.
    """
    shapes: dict[str, list[int]] = {}
    for name, shape in list(record.shapes.items())[:MAX_SHAPES]:
        shapes[plain(name, MAX_NAME)] = [int(size) for size in shape[:MAX_DIMS]]
    finite = record.norm is not None and math.isfinite(record.norm)
    values = fixed | {
        "part": plain(record.part, MAX_NAME),
        "kind": plain(str(record.kind), MAX_NAME),
        "tensors": max(record.tensors, len(record.shapes)),
        "shapes": shapes,
        "bytes": record.bytes,
        "sha256": record.sha256,
        "norm": float(record.norm) if finite and record.norm is not None else None,
        "cases": record.cases,
        "decision": record.decision,
        "reason": plain(record.reason, MAX_REASON),
    }
    try:
        values["hash"] = hashlib.sha256(canonical(values)).hexdigest()
        entry = Entry.model_validate(values)
    except (ValidationError, TypeError) as error:
        wrong = error.errors()[0]["loc"][0] if isinstance(error, ValidationError) else "values"
        raise ledger_error(
            site,
            f"a record does not fit the ledger ('{wrong}'); nothing was written. Report it with the worker's log.",
        ) from error
    return entry, canonical(values) + b"\n"


def plain(text: str, most: int) -> str:
    """Return text of the other end as it may stand in a record: short, without control characters."""
    cut = text[:most]
    return cut if cut.isprintable() else ascii(cut)[1:-1][:most]


def canonical(value: dict[str, Any]) -> bytes:
    """Return the one form in which an entry or a head is written: sorted keys, no spaces, ASCII."""
    return _ENCODER.encode(value).encode("ascii")


def parse_head(text: str) -> Head:
    """Return the head of "N:HASH".

    Raises:
        LedgerError: It is none.
    """
    match = _HEAD.fullmatch(text.strip())
    if match is None or (int(match[1]) == 0) != (match[2] == ZERO):
        raise ledger_error(
            "",
            "a head is written N:HASH, the number of an entry and the 64 hexadecimal digits of its hash; what was given "
            "is none. Copy it whole from where it was noted.",
        )
    return Head(int(match[1]), match[2], "the head noted elsewhere")


def read_head(path: Path, site: str = "") -> Head | None:
    """Return what the head file beside a ledger says, or None if there is neither a head file nor an entry.

    Raises:
        LedgerError: The head file is missing though the ledger has bytes, or is not readable as one.
        OSError: The volume cannot be read.
    """
    place = path.with_name(HEAD_FILE)
    try:
        with open(open_regular(place, os.O_RDONLY, site), "rb") as stream:
            data = stream.read(_MAX_HEAD + 1)
    except FileNotFoundError:
        if path.is_file() and path.stat().st_size:
            raise ledger_error(
                site,
                "the ledger's head file is missing though the ledger has entries: lines may have been removed at its "
                f"end. Bring the head file back from a backup. {KEEP}",
                place,
            ) from None
        return None
    try:
        found = json.loads(data)
        head = Head(found["n"], found["hash"], "its head file")
        parse_head(f"{head.n}:{head.hash}")
    except (ValueError, KeyError, TypeError, RecursionError, LedgerError):
        found = None
    if found is None or canonical({"n": head.n, "hash": head.hash}) + b"\n" != data:
        raise ledger_error(
            site,
            f"the ledger's head file was changed: it is not what the ledger writes. Bring it back from a backup. {KEEP}",
            place,
        )
    return head


def open_regular(path: Path, flags: int, site: str = "") -> int:
    """Open a file that must be a regular one (a pipe or device would hang or swallow the record).

    Raises:
        LedgerError: It is something else, or a link to something else.
        OSError: It cannot be opened; FileNotFoundError if there is nothing.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        regular = False  # a link to nothing
    handle = os.open(path, flags | FLAGS) if regular else -1
    if not regular or not stat.S_ISREG(os.fstat(handle).st_mode):
        if handle >= 0:
            os.close(handle)
        raise ledger_error(
            site,
            "the ledger must be a regular file or a link to one; something else lies in its place.",
            path,
        )
    return handle


def ledger_error(site: str, sentence: str, path: Path | None = None) -> LedgerError:
    """Return a LedgerError: the sentence begins with the site's alias, or with a capital."""
    text = f"{site}: {sentence}" if site else sentence[0].upper() + sentence[1:]
    return LedgerError(text, detail=str(path or ""), site=site)


def cut_short(site: str, head: Head, count: int, path: Path) -> LedgerError:
    """Return the error of a ledger that has fewer entries than a head says."""
    return ledger_error(
        site,
        f"the ledger is cut short: {head.source} says {head.n} entries, it has {count}. {KEEP}",
        path,
    )


def storage_error(site: str, path: Path, error: OSError, *, writing: bool) -> StorageError:
    """Return the StorageError of a fault of the volume, in a sentence that may cross the border."""
    why = _FAULTS.get(error.errno or 0, f"system error {errno.errorcode.get(error.errno or 0, 'unknown')}")
    if writing:
        text = (
            f"the ledger cannot be written ({why}); nothing leaves the site that is not recorded. Free space or repair "
            "the volume of the site's home folder, then ask again."
        )
    else:
        text = f"the ledger cannot be read ({why}). Repair the volume or its permissions, then ask again."
    text = f"{site}: {text}" if site else text[0].upper() + text[1:]
    return StorageError(text, detail=f"{path}: {error}", site=site)
