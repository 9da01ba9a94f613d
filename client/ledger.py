"""A hospital's ledger: what came in and what went out, one hash-chained line each, on the hospital's own volume.

    home/ledger.jsonl    one JSON line an entry, never rewritten; each carries the hash of the line before it
    home/ledger.head     {"hash": .., "n": ..} of the last entry, so that lines removed at the end are noticed
    home/ledger.lock     held while a worker writes, so that no second process does

A line is the canonical JSON of its entry (sorted keys, no spaces, ASCII), and its hash is the SHA-256 of the same
without the key `hash`: every byte of the file counts. A part leaves only after its line is on the disk; where the
line cannot be written, nothing leaves.

The chain shows changes to whoever holds a head from outside. Somebody who may write all files of this folder can write
a whole new chain; this is why the head goes with every answer to the coordinator, who notes it, and why `verify` takes
such a head as a witness.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.ledger_lines import (
    FLAGS,
    HEAD_FILE,
    KEEP,
    LEDGER_FILE,
    LOCK_FILE,
    MAX_NAME,
    RECOVERED,
    ZERO,
    Direction,
    Entry,
    Phase,
    Record,
    Scan,
    canonical,
    cut_short,
    ledger_error,
    make_entry,
    open_regular,
    parse_head,
    plain,
    read_head,
    storage_error,
)  # fmt: skip

__all__ = ["LEDGER_FILE", "RECOVERED", "Entry", "Ledger", "Record", "Summary", "read", "utc_now", "verify"]

MAX_ROUNDS = 64  # runs and rounds whose byte counters are kept


@dataclass(frozen=True)
class Summary:
    """A ledger that was verified.

    Attributes:
        entries: Whole lines.
        first_time: Of the first entry; empty if there is none.
        last_time: Of the last entry; empty if there is none.
        head: "N:HASH" of the last entry.
        torn_bytes: Bytes of a last line that is not whole (being written just now, or cut by a crash).
    """

    entries: int
    first_time: str
    last_time: str
    head: str
    torn_bytes: int


def utc_now() -> datetime:
    """Return the time now, in UTC."""
    return datetime.now(UTC)


class Ledger:
    """A ledger opened for writing by this process alone; safe to use from several threads.

    Opening reads the whole file and verifies it. A last line without its end (a crash while it was written; its part
    never left) is cut off, and the next line says so.

    Args:
        path: The file `ledger.jsonl`; its folder is made.
        clock: Gives the time of an entry.
        site: Alias, for sentences.

    Raises:
        LedgerError: Changed, out of order, cut short, not a ledger, no regular file, or held by another process.
        StorageError: The volume cannot be read or written.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime] = utc_now, *, site: str = "") -> None:
        self.path = path
        self.site = site
        self._clock = clock
        self._mutex = threading.Lock()
        self._fd = self._lock_fd = -1
        self._count, self._hash, self._size = 0, ZERO, 0
        self._dirty = False  # bytes of a failed append may still lie behind _size
        self._last: Entry | None = None
        self._bytes: OrderedDict[tuple[str, int], dict[str, int]] = OrderedDict()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = _lock(path.with_name(LOCK_FILE), site)
            self._open()
        except OSError as error:
            self.close()
            raise storage_error(site, path, error, writing=True) from error
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> str:
        """Return "N:HASH" of the last entry ("0:" and 64 zeros before the first)."""
        with self._mutex:
            return f"{self._count}:{self._hash}"

    @property
    def count(self) -> int:
        """Return how many entries there are."""
        with self._mutex:
            return self._count

    def bytes_in(self, run: str, round_: int, direction: Direction) -> int:
        """Return the bytes that were released or received so far in a run and round, restarts included.

        Only the newest `MAX_ROUNDS` runs and rounds are kept; an older one counts as 0.
        """
        with self._mutex:
            return self._bytes.get((plain(run, MAX_NAME), round_), {}).get(direction, 0)

    def append(
        self, run: str, round_: int, phase: Phase, direction: Direction, parts: Sequence[Record]
    ) -> str:
        """Write the entries of one message, all or none, and return the new head once they are on the disk.

        Args:
            run: Identifier of the run.
            round_: Round, 0 where the message belongs to none.
            phase: What the message is for.
            direction: "in" or "out".
            parts: One record per part.

        Raises:
            StorageError: The volume cannot be written; the ledger is as it was before, and nothing may leave.
            LedgerError: A record that does not fit, a closed ledger, or a file that another program changed.
        """
        with self._mutex:
            self._append(run, round_, phase, direction, parts)
            return f"{self._count}:{self._hash}"

    def close(self) -> None:
        """Close the file and let another process have it."""
        with self._mutex:
            for handle in (self._fd, self._lock_fd):
                if handle >= 0:
                    os.close(handle)
            self._fd = self._lock_fd = -1

    def _open(self) -> None:
        head = read_head(self.path, self.site)
        if not os.path.lexists(self.path):
            if head is not None and head.n:
                raise cut_short(self.site, head, 0, self.path)
            # The head comes first: a ledger with lines has one, whenever a crash comes.
            _write_head(self.path, 0, ZERO)
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | FLAGS, 0o640)
            _flock(self._fd, self.site)
            _sync_folder(self.path.parent)
            return
        self._fd = open_regular(self.path, os.O_RDWR | os.O_APPEND, self.site)
        _flock(self._fd, self.site)  # two links to one file have two lock files
        with open(self._fd, "rb", closefd=False) as stream:
            scan = Scan(stream, self.path, self.site, [head] if head else [])
            for entry in scan:
                self._book(entry)
                self._last = entry
        self._count, self._hash, self._size = scan.count, scan.hash, scan.good
        if scan.tail:
            self._recover(scan.tail)
        elif head is None or head.n != self._count:
            _write_head(self.path, self._count, self._hash)

    def _recover(self, tail: bytes) -> None:
        """Cut a torn last line off, and say so with an entry of its own."""
        os.ftruncate(self._fd, self._size)
        digest = hashlib.sha256(tail).hexdigest()
        reason = f"a torn line of {len(tail)} bytes was cut off; its part never left or was not used"
        record = Record(RECOVERED, RECOVERED, len(tail), digest, decision="received", reason=reason)
        last = self._last  # the torn line most likely belonged to what was going on
        where = (last.run, last.round, last.phase) if last else ("", 0, "hello")
        try:
            self._append(where[0], where[1], where[2], "in", [record])
        except BaseException:
            with suppress(OSError):  # its space was just freed: the next opening shall find it and say so
                os.write(self._fd, tail)
            raise

    def _append(
        self, run: str, round_: int, phase: Phase, direction: Direction, parts: Sequence[Record]
    ) -> None:
        if self._fd < 0:
            raise ledger_error(self.site, "the ledger is closed; start the worker again.", self.path)
        entries: list[Entry] = []
        lines: list[bytes] = []
        previous = self._hash
        fixed = {
            "time": _stamp(self._clock()),
            "run": plain(run, MAX_NAME),
            "round": round_,
            "phase": phase,
            "direction": direction,
        }
        for number, record in enumerate(parts, self._count + 1):
            entry, line = make_entry({**fixed, "n": number, "prev": previous}, record, self.site)
            entries.append(entry)
            lines.append(line)
            previous = entry.hash
        if not entries:
            return
        self._write(b"".join(lines), entries[-1])
        for entry in entries:
            self._book(entry)

    def _write(self, data: bytes, last: Entry) -> None:
        """Put lines on the disk, then the head; anything that fails leaves both as they were."""
        try:
            self._check_untouched()
            self._dirty = True
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written")
            os.fsync(self._fd)
            _write_head(self.path, last.n, last.hash)
        except OSError as error:
            self._roll_back()
            raise storage_error(self.site, self.path, error, writing=True) from error
        except BaseException:
            self._roll_back()
            raise
        self._dirty = False
        self._count, self._hash, self._last = last.n, last.hash, last
        self._size += len(data)

    def _check_untouched(self) -> None:
        if self._dirty:  # an earlier failure could not be taken back then
            os.ftruncate(self._fd, self._size)
            self._dirty = False
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise ledger_error(
                self.site, f"the ledger was moved or replaced while the worker runs. {KEEP}", self.path
            )
        if mine.st_size != self._size:
            raise ledger_error(
                self.site,
                f"the ledger has {mine.st_size} bytes, {self._size} were written: another program changed it. {KEEP}",
                self.path,
            )

    def _roll_back(self) -> None:
        if not self._dirty:
            return
        try:
            os.ftruncate(self._fd, self._size)
            self._dirty = False
            os.fsync(self._fd)
        except OSError:
            pass  # what is left is whole lines and a torn one: the next append or opening deals with it

    def _book(self, entry: Entry) -> None:
        """Count an entry's bytes for its run and round."""
        if entry.decision == "refused" or entry.part == entry.kind == RECOVERED:
            return
        key = (entry.run, entry.round)
        counters = self._bytes.setdefault(key, {})
        counters[entry.direction] = counters.get(entry.direction, 0) + entry.bytes
        self._bytes.move_to_end(key)
        if len(self._bytes) > MAX_ROUNDS:
            self._bytes.popitem(last=False)


def verify(path: Path, head: str = "") -> Summary:
    """Prove that a ledger is whole and unchanged. Reads only; a worker may go on writing meanwhile.

    Args:
        path: The file `ledger.jsonl`, its head file beside it.
        head: "N:HASH" that was noted elsewhere (the coordinator notes one with every answer): entry N must have it.

    Raises:
        LedgerError: Naming the first line that is wrong, and how.
        StorageError: The volume cannot be read.
    """
    witness = parse_head(head) if head else None
    try:
        own = read_head(path, "")  # before the lines: a worker that goes on writing only ever adds to them
        if not os.path.lexists(path):
            if own is not None and own.n:
                raise cut_short("", own, 0, path)
            raise ledger_error("", "there is no ledger here: expected a file ledger.jsonl.", path)
        first = last = ""
        with open(open_regular(path, os.O_RDONLY, ""), "rb") as stream:
            scan = Scan(stream, path, heads=[found for found in (own, witness) if found])
            for entry in scan:
                first, last = first or entry.time, entry.time
    except OSError as error:
        raise storage_error("", path, error, writing=False) from error
    return Summary(scan.count, first, last, f"{scan.count}:{scan.hash}", len(scan.tail))


def read(path: Path) -> Iterator[Entry]:
    """Yield the entries of a ledger, each checked against the one before it; a torn last line is left out.

    Raises:
        LedgerError: At the first line that is wrong; the entries before it were yielded.
        StorageError: The volume cannot be read.
    """
    try:
        with open(open_regular(path, os.O_RDONLY, ""), "rb") as stream:
            yield from Scan(stream, path)
    except OSError as error:
        raise storage_error("", path, error, writing=False) from error


def _stamp(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _lock(path: Path, site: str) -> int:
    """Open and hold the lock file; it stays in its place when it is let go."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | FLAGS, 0o640)
    try:
        _flock(handle, site)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _flock(handle: int, site: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ledger_error(
            site,
            "another worker writes this ledger. Stop the other one, or give every site a home folder of its own.",
        ) from error


def _write_head(ledger: Path, count: int, digest: str) -> None:
    """Replace the head file. Its rename need not outlive a power cut: a head that is behind is brought up to date."""
    place = ledger.with_name(HEAD_FILE)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(canonical({"n": count, "hash": digest}) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
