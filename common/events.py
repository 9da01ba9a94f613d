"""Events: what every process says about its work, as JSON lines in one closed, versioned schema.

Each process writes its own file in its own folder (`events.jsonl` at the coordinator, `events-ALIAS.jsonl` at a site)
and, where asked, to stdout. An event has a name from the table below and only the fields the table gives it; text
values are short words, aliases, codes or safe sentences (common/errors.py), never a path, an identifier or the text
of a foreign exception. docs/events.md is made from this table.

Every line carries: v (schema version), t (seconds since the epoch, UTC), process (server, relay, worker, supernode,
trial), event, and where known run and site.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from common.errors import WardroundError

EVENT_SCHEMA = 1

# name -> (meaning, {field: meaning})
EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "trial.start": (
        "the operator's command began",
        {
            "method": "name",
            "task": "name",
            "data": "name of the data set",
            "sites": "aliases",
            "rounds": "count",
            "runtime": "fast or stock",
        },
    ),
    "trial.phase": (
        "what the command is doing",
        {"phase": "keys, data, check, start, register, ready, run, report, stop"},
    ),
    "trial.end": (
        "the command's verdict",
        {"verdict": "ok or failed", "seconds": "wall", "code": "error code", "message": "safe sentence"},
    ),
    "process.start": ("a process was started", {"name": "its name", "pid": "its id"}),
    "process.ready": ("a process answered", {"name": "its name", "seconds": "since its start"}),
    "process.exit": (
        "a process ended",
        {"name": "its name", "code": "exit code", "expected": "true if it was told to"},
    ),
    "run.start": (
        "the server began a run",
        {
            "method": "name",
            "task": "name",
            "rounds": "count",
            "seed": "the run's seed",
            "parameters": "trainable values",
            "bytes": "of one model",
            "software": "version",
        },
    ),
    "run.end": (
        "the server ended a run",
        {
            "verdict": "ok or failed",
            "seconds": "wall",
            "rounds": "completed",
            "code": "error code",
            "message": "safe sentence",
            "flower_run": "Flower's id of the attempt",
        },
    ),
    "site.ready": (
        "a site gave its first answer and fits",
        {
            "cases": "cases by split",
            "device": "cpu or cuda",
            "software": "version",
            "check": "figures of its data check",
        },
    ),
    "site.refused": ("a site does not fit the run", {"code": "error code", "message": "safe sentence"}),
    "site.joined": (
        "a site that was not there when the run began, or came back as another node, takes part from now on",
        {"round": "the first it is asked in", "cases": "training cases"},
    ),
    "site.retry": (
        "a site could not be reached or lost the message; it is asked again",
        {
            "round": "1-based",
            "code": "error code",
            "message": "safe sentence",
            "attempt": "1 for the first repetition",
            "seconds": "wait before it",
        },
    ),
    "site.late": (
        "an answer arrived after its round had ended, or twice; it is refused",
        {"round": "the round it was for", "seconds": "since it was asked"},
    ),
    "run.resume": (
        "the server continues a run from its checkpoint",
        {"round": "last complete round; 0 if none was", "attempt": "how often the run was continued, from 1"},
    ),
    "checkpoint.refused": (
        "a checkpoint could not be read; the one before it is used",
        {"round": "1-based", "code": "error code", "message": "safe sentence"},
    ),
    "process.restart": (
        "the supervisor starts a process again",
        {
            "name": "its name",
            "attempt": "1-based, since it last ran well",
            "why": "exited, silent or lost",
            "seconds": "wait before it",
        },
    ),
    "round.start": (
        "a round began",
        {"round": "1-based", "sites": "aliases asked", "closing": "true for the last evaluation"},
    ),
    "round.end": (
        "a round ended",
        {
            "round": "1-based",
            "seconds": "wall",
            "slowest": "local seconds of the slowest site",
            "overhead": "seconds - slowest",
            "sites": "aliases that contributed",
            "missing": "aliases that did not",
            "cases": "training cases by alias",
            "closing": "true for the last evaluation",
            "loss": "mean training loss",
        },
    ),
    "site.asked": ("a message went to a site", {"round": "1-based"}),
    "site.reply": (
        "a site's answer arrived",
        {
            "round": "1-based",
            "seconds": "since asked",
            "local": "seconds in the worker",
            "phases": "seconds by phase in the worker",
            "relay": "CPU seconds and MB of the relay",
            "ledger": "COUNT:HASH of the site's ledger when the answer left",
            "cases": "training cases",
            "loss": "mean training loss",
        },
    ),
    "site.failed": (
        "a site failed in a round",
        {"round": "1-based", "code": "error code", "message": "safe sentence"},
    ),
    "bytes": (
        "what crossed the border in a message, by kind",
        {"round": "1-based", "direction": "down or up", "kinds": "bytes by kind", "total": "sum"},
    ),
    "transport": (
        "what the site's connection to the coordinator carried since its start, counted at the site",
        {"down": "bytes", "up": "bytes", "calls": "count"},
    ),
    "metric": (
        "a site's figures for one model",
        {
            "round": "round whose result was evaluated (0 = the initial model)",
            "split": "validation or test",
            "model": "global or personal",
            "cases": "count",
            "values": "figure by name",
            "primary": "name of the main figure",
        },
    ),
    "phase": (
        "what a worker is doing",
        {
            "round": "1-based",
            "phase": "load, evaluate, sketch, sensitivity, train, personal, send, idle",
            "step": "steps done",
            "steps": "steps planned",
            "seconds": "of the phase before",
        },
    ),
    "memory": (
        "a process's memory",
        {
            "name": "its name",
            "rss": "MB now",
            "peak": "MB at most",
            "gpu": "MB at most on the GPU",
            "round": "1-based",
        },
    ),
    "checkpoint": ("the server wrote its state", {"round": "1-based", "seconds": "wall", "bytes": "size"}),
    "model.saved": (
        "a model was written",
        {"name": "file name in models/", "bytes": "size", "round": "1-based"},
    ),
    "slices.saved": (
        "a site wrote example slices, which stay there",
        {"round": "1-based", "count": "pictures"},
    ),
    "styles.saved": (
        "a site wrote how one of its training samples looks in other sites' styles, which stays there",
        {"round": "1-based", "count": "pictures"},
    ),
    "method.figures": (
        "what the method tells of a finished round beside its model, for the report",
        {
            "round": "1-based",
            "method": "name",
            "figures": "by name: numbers, aliases and names of the model's tensors; `kind` says which (docs/methods)",
        },
    ),
    "warning": (
        "something an operator should know",
        {"code": "short code", "message": "safe sentence", "round": "1-based"},
    ),
}


class EventLog:
    """Appends events to a JSON-lines file; safe to use from several threads.

    Args:
        path: File to append to; its folder is made. None keeps no file.
        process: Which kind of process writes.
        site: Alias written on every line, unless an event gives its own.
        run: Run identifier written on every line.
        stream: Also write each line here (stdout in containers).
    """

    def __init__(
        self, path: Path | None, process: str, *, site: str = "", run: str = "", stream: TextIO | None = None
    ) -> None:
        self.process = process
        self.site = site
        self.run = run
        self._stream = stream
        self._lock = threading.Lock()
        self._fd = -1
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(self._fd, b"\n")  # a crash left half a line: the next event begins its own

    def emit(self, event: str, /, **fields: Any) -> None:
        """Write one event.

        Args:
            event: A name of `EVENTS`.
            **fields: Fields of that event, and `site`.

        Raises:
            WardroundError: The event or a field is not in the table (a programming error).
        """
        if event not in EVENTS:
            raise WardroundError(f"Unknown event '{event}'.")
        unknown = fields.keys() - EVENTS[event][1].keys() - {"site"}
        if unknown:
            raise WardroundError(f"Event '{event}' has no field {sorted(unknown)}.")
        line: dict[str, Any] = {
            "v": EVENT_SCHEMA,
            "t": round(time.time(), 4),
            "process": self.process,
            "event": event,
        }
        if self.run:
            line["run"] = self.run
        if self.site:
            line["site"] = self.site
        line.update({key: value for key, value in fields.items() if value is not None})
        text = json.dumps(_plain(line), separators=(",", ":")) + "\n"
        with self._lock:
            if self._fd >= 0:
                # One write of a whole line: readers never see half of it. A full volume costs the line, not the work.
                with contextlib.suppress(OSError):
                    os.write(self._fd, text.encode())
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value or value in (float("inf"), float("-inf")) else round(value, 6)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file; a line that is not whole (still being written, or cut by a crash) is left out."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue
