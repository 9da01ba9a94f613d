"""From a run folder's event files to its story, all at once or while they grow.

Reads whatever is there: a missing file, a last half line, a line that is no JSON or a field of the wrong type costs
that line or that field and nothing else. Text is cleaned of control characters on the way in, since it goes to
terminals and pages and some of it was written elsewhere.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.events import EVENT_SCHEMA
from ops.story import Story
from ops.story_events import add, fill_from_config
from ops.story_fields import Event, number

CONFIG_FILE = "config.json"
EVENT_FILES = "events*.jsonl"
SERVER_FILE = "events.jsonl"
_LONGEST = 2000


class Tail:
    """Reads a growing JSON-lines file: each whole line once, in order.

    Args:
        path: The file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0
        self._offset = 0
        self._rest = b""

    def poll(self) -> list[Event]:
        """Return the events of the lines that were completed since the last call."""
        try:
            size = self.path.stat().st_size
            if size == self._offset:
                return []
            if size < self._offset:  # another file under the same name
                self._offset, self._rest = 0, b""
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [event for line in lines if (event := self._parse(line)) is not None]

    def _parse(self, line: bytes) -> Event | None:
        if not line.strip():
            return None
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if (
            not isinstance(event, dict)
            or not isinstance(event.get("event"), str)
            or event.get("v") != EVENT_SCHEMA
        ):
            self.unreadable += 1
            return None
        return cleaned(event)  # type: ignore[no-any-return]


class RunReader:
    """Keeps a story up to date with its run folder.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.story = Story(run=cleaned(folder.name))
        self._tails: dict[str, Tail] = {}
        self._config_read = False

    def poll(self, each: Callable[[Event], None] | None = None) -> list[Event]:
        """Read what is new, add it to the story, and return it in the order of time.

        Args:
            each: Called after each event, when the story knows just this and what was before.
        """
        self._read_config()
        for path in sorted(self.folder.glob(EVENT_FILES)):
            self._tails.setdefault(path.name, Tail(path))
        new: list[tuple[float, Event]] = []
        # At the same instant the server speaks first: the command only reacts to it.
        for _, tail in sorted(self._tails.items(), key=lambda item: (item[0] != SERVER_FILE, item[0])):
            latest = -math.inf
            for event in tail.poll():
                # A file's own order is kept even where its clock was set back.
                latest = max(latest, number(event, "t") or latest)
                new.append((latest, event))
        new.sort(key=lambda item: item[0])
        for _, event in new:
            add(self.story, event)
            if each is not None:
                each(event)
        self.story.unreadable = sum(tail.unreadable for tail in self._tails.values())
        return [event for _, event in new]

    def _read_config(self) -> None:
        if self._config_read:
            return
        try:
            document = json.loads((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self._config_read = True
        if not isinstance(document, dict):
            return
        fill_from_config(self.story, cleaned(document))


def read_story(folder: Path) -> Story:
    """Return the story of a run folder, as far as it went.

    Raises:
        ConfigError: The folder holds no run.
    """
    check_run_folder(folder)
    reader = RunReader(folder)
    reader.poll()
    return reader.story


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that holds no run.

    Raises:
        ConfigError: Neither config.json nor an event file is there.
    """
    if not (folder / CONFIG_FILE).is_file() and not any(folder.glob(EVENT_FILES)):
        raise ConfigError(
            "The folder holds no run: expected config.json or events.jsonl. Give the run folder that `wardround trial` "
            "named (runs/TIME-METHOD, or what --out said).",
            detail=str(folder),
        )


def cleaned(value: Any) -> Any:
    """Return a JSON value whose texts have no control or direction characters and no absurd length."""
    if isinstance(value, str):
        if value.isascii() and value.isprintable():
            return value[:_LONGEST]
        return "".join(
            " " if unicodedata.category(sign) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else sign
            for sign in value[:_LONGEST]
        )
    if isinstance(value, dict):
        return {cleaned(str(key)): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return value
