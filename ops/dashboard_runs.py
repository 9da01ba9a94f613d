"""The runs of a folder, kept up to date by reading only what their event files have grown by.

Work and memory are bounded by the folder, not by who asks: a run is read again only when its files changed, the folder
is looked through at most once a second, one look reads for a few seconds at most (the rest has its turn with the next
one), and the story of a run that rests is let go after its row was made. Nothing is written, and nothing is opened but
regular files of known names in real folders below the runs folder.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from common.errors import ConfigError
from ops.dashboard_rows import RunRow, summary
from ops.dashboard_since import Since
from ops.story import Story
from ops.story_reader import CONFIG_FILE, EVENT_FILES, RunReader, check_run_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of run folders that are shown: they need no escaping in an address, a page or a label."""
MOST_RUNS = 500
MOST_BYTES = 64 * 1024 * 1024
LEAST_SECONDS = 1.0
BUDGET_SECONDS = 3.0
PATIENCE_SECONDS = 60.0
RESTS_AFTER = 3600.0
MOST_RESTING = 2
SILENT_SECONDS = 300.0

_NOT_REGULAR = (
    "One of its files is no regular file (a link, a pipe) and is not opened. Put the file itself there."
)
_TOO_LARGE = (
    f"Its event files are larger than {MOST_BYTES // 2**20} MB. Look at it with `wardround report` instead."
)
_NOT_YET = "Its events have not been read yet; they have their turn within the next seconds."
_NOT_READABLE = "Its files cannot be read. Allow the user that the dashboard runs as to read them."
_BROKEN = "Its events cannot be told. `wardround report` on its folder shows the reason; keep the files when you report it."

_ODD, _CLOSED = -1, -2
Print = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Snapshot:
    """What was seen at one look.

    Attributes:
        rows: The runs, the one that began last first.
        at: When, seconds since the epoch.
        left_out: Folders with a run that are not shown, because of their name or because they are links.
        older: Runs beyond `MOST_RUNS`.
        gone: The runs folder could not be read.
    """

    rows: tuple[RunRow, ...] = ()
    at: float = 0.0
    left_out: int = 0
    older: int = 0
    gone: bool = False

    @property
    def newest(self) -> float | None:
        """The newest event of all runs, seconds since the epoch."""
        return max((row.latest for row in self.rows if row.latest is not None), default=None)


@dataclass
class _Told:
    """The story of a run in memory."""

    reader: RunReader
    since: Since = field(default_factory=Since)


@dataclass
class _Run:
    """What is kept of a run."""

    row: RunRow
    print: Print = ()
    told: _Told | None = None
    used: float = 0.0


@dataclass(frozen=True)
class Opened:
    """A run with its story, to be used while it is held.

    Attributes:
        print: Changes with its files: same print, same story.
    """

    row: RunRow
    story: Story
    since: Since
    folder: Path
    print: Print


class Board:
    """Knows the runs of a folder; may be asked by several threads.

    Args:
        folder: The runs folder.
        silent_after: Seconds without an event after which a run that has not ended is called silent.
        clock: Seconds since the epoch.
        least: Seconds between two looks at the folder.

    Raises:
        ConfigError: There is no such folder, it cannot be read, or it is a single run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        silent_after: float = SILENT_SECONDS,
        clock: Callable[[], float] = time.time,
        least: float = LEAST_SECONDS,
    ) -> None:
        self.folder = _checked(folder)
        self.silent_after = silent_after
        self.clock = clock
        self._least = least
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        self._last: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """Return the runs as they are now, or as they were at the last look if somebody else is looking just now."""
        last = self._last
        if not self._lock.acquire(blocking=last is None):
            assert last is not None
            return last
        try:
            if self._last is None or not 0 <= self.clock() - self._last.at < self._least:
                self._last = self._look()
            return self._last
        finally:
            self._lock.release()

    @contextmanager
    def opened(self, name: str) -> Iterator[Opened | None]:
        """Hold a run and its story; None if there is no such run or it cannot be read.

        Args:
            name: As in a row. Anything else is no run: no path is ever made of what was asked for.

        Raises:
            TimeoutError: Others hold it for too long.
        """
        if not self._lock.acquire(timeout=PATIENCE_SECONDS):
            raise TimeoutError
        try:
            yield self._open(name)
        finally:
            self._lock.release()

    def _open(self, name: str) -> Opened | None:
        run = self._runs.get(name)
        if run is None:
            return None
        folder = self.folder / name
        files = None if folder.is_symlink() else _files(folder)
        if files is None:
            return None
        self._bring_up(name, run, files, tell=True)
        run.used = self.clock()
        if run.told is None:
            return None
        return Opened(run.row, run.told.reader.story, run.told.since, folder, run.print)

    def _look(self) -> Snapshot:
        now = self.clock()
        try:
            found, left_out = self._find()
        except OSError:
            return Snapshot(self._last.rows if self._last else (), now, gone=True)
        order = sorted(found, key=lambda name: (_written(found[name]) or 0.0, name), reverse=True)
        chosen = order[:MOST_RUNS]
        for name in set(self._runs) - set(chosen):
            del self._runs[name]
        limit = time.monotonic() + BUDGET_SECONDS
        for name in chosen:
            run = self._runs.setdefault(name, _Run(_waiting(name, found[name])))
            if time.monotonic() < limit:
                self._bring_up(name, run, found[name])
                self._let_go(now)
        rows = sorted(
            (self._runs[name].row for name in chosen),
            key=lambda row: (row.latest if row.begun is None else row.begun) or 0.0,
            reverse=True,
        )
        return Snapshot(tuple(rows), now, left_out, len(order) - len(chosen))

    def _find(self) -> tuple[dict[str, Print], int]:
        """Return the runs by name, and how many folders with a run are left out."""
        found: dict[str, Print] = {}
        left_out = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                linked = entry.is_symlink()
                if not entry.is_dir(follow_symlinks=False) and not linked:
                    continue
                files = None if linked else _files(Path(entry.path))
                if linked or (files and NAME.fullmatch(entry.name) is None):
                    left_out += 1
                elif files:
                    found[entry.name] = files
        return found, left_out

    def _bring_up(self, name: str, run: _Run, files: Print, *, tell: bool = False) -> None:
        """Read what is new of a run; nothing if its files are as they were (and its story is not asked for)."""
        if files == run.print and not (tell and run.told is None and not run.row.problem):
            return
        if run.told is not None and _replaced(run.print, files):
            run.told = None  # other files under the same names: what was read is not theirs
        problem = _problem(files)
        if not problem:
            told = run.told or _Told(RunReader(self.folder / name))
            try:
                told.reader.poll(told.since.note)
                run.row, run.told = summary(name, told.reader.story, told.since, _written(files)), told
            except OSError:
                problem = _NOT_READABLE
            except Exception as error:  # whatever one run's files hold, the other runs are still to be shown
                sys.stderr.write(f"dashboard: a run cannot be told ({type(error).__name__})\n")
                problem = _BROKEN
        if problem:
            run.row, run.told = RunRow(name, problem=problem, latest=_written(files)), None
        run.print = files

    def _let_go(self, now: float) -> None:
        """Let go of the stories of runs that rest, but for those that somebody looked at last."""
        resting = [
            run
            for run in self._runs.values()
            if run.told is not None
            and (run.row.ended or run.row.latest is None or now - run.row.latest > RESTS_AFTER)
        ]
        for run in sorted(resting, key=lambda item: item.used)[: max(len(resting) - MOST_RESTING, 0)]:
            run.told = None


def _checked(folder: Path) -> Path:
    """Return the real folder.

    Raises:
        ConfigError: As `Board` says.
    """
    try:
        real = folder.resolve(strict=True)
        with os.scandir(real):
            pass
    except (OSError, RuntimeError) as error:
        known = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "there is no such folder" if known else "it cannot be read"
        raise ConfigError(
            f"The dashboard needs the folder that holds the run folders, but {why}. Give it: `wardround dashboard "
            "RUNS_DIR` (runs, where `wardround trial` was started), or make it before the first run.",
            detail=f"{folder}: {error}",
        ) from error
    try:
        check_run_folder(real)
    except ConfigError:
        return real
    raise ConfigError(
        "This folder is a single run, and the dashboard shows a folder of runs: expected the folder above it. Give "
        "that one, or follow this run with `wardround watch RUN_DIR`.", detail=str(real),
    )  # fmt: skip


def _files(folder: Path) -> Print | None:
    """Return (name, size, change in ns, file number) of a run's files; _ODD or _CLOSED as size of what is not opened."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name != CONFIG_FILE and not fnmatchcase(entry.name, EVENT_FILES):
                    continue
                state = entry.stat(follow_symlinks=False)
                size = state.st_size if stat.S_ISREG(state.st_mode) else _ODD
                if size >= 0 and not os.access(entry.path, os.R_OK):
                    size = _CLOSED
                if entry.name == CONFIG_FILE and size >= 0:
                    found.append((entry.name, size, state.st_mtime_ns, 0))  # is written by replacing it
                else:
                    found.append((entry.name, size, state.st_mtime_ns, state.st_ino))
    except PermissionError:
        return (("", _CLOSED, 0, 0),)
    except OSError:
        return None
    return tuple(sorted(found))


def _problem(files: Print) -> str:
    sizes = {size for _, size, _, _ in files}
    if sizes & {_ODD, _CLOSED}:
        return _NOT_REGULAR if _ODD in sizes else _NOT_READABLE
    return _TOO_LARGE if sum(size for _, size, _, _ in files) > MOST_BYTES else ""


def _written(files: Print) -> float | None:
    """Return when an event file was written last; of a run without any, its configuration."""
    times = [changed for name, _, changed, _ in files if name != CONFIG_FILE] or [
        changed for _, _, changed, _ in files
    ]
    return max(times) / 1e9 if times else None


def _replaced(before: Print, after: Print) -> bool:
    """Tell whether an event file is gone, has shrunk, or is another one under the same name."""
    now = {name: (size, number) for name, size, _, number in after}
    return any(
        name not in now or now[name][0] < size or now[name][1] != number
        for name, size, _, number in before
        if name != CONFIG_FILE
    )


def _waiting(name: str, files: Print) -> RunRow:
    return RunRow(name, problem=_NOT_YET, latest=_written(files))
