"""What a preflight finds: one line a check, with the remedy where something fails. Nothing is changed by any check.

The checks themselves are in preflight_site (kit, key, configuration, data), preflight_engine (Docker, images, machine),
preflight_network (name, port, TLS, proxy) and preflight_clock; ops/preflight_run.py says which are made, in which order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from common.errors import ProcessError, WardroundError

Mark = Literal["ok", "warn", "fail", "skipped"]
_COLOURS: Mapping[Mark, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
_WORDS: Mapping[Mark, str] = {"ok": "in order", "warn": "warned", "fail": "failed", "skipped": "skipped"}
_WIDTH = 10  # of a check's name
_SENTENCE_END = re.compile(r"(?<!e\.g)\.\s+(?=[A-Z`])")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: Of the check.
        mark: "ok"; "warn": it runs, but somebody should know; "fail": it would not run; "skipped": not checked.
        found: A safe sentence: no path, no name of a machine or person of the hospital.
        remedy: What to do; empty where nothing is to be done.
        detail: For this terminal alone: paths, addresses inside the hospital, foreign texts.
        exit_code: Of the error that this would be; 0 unless it fails.
    """

    name: str
    mark: Mark
    found: str
    remedy: str = ""
    detail: str = ""
    exit_code: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """Return what may be passed on: everything but `detail`."""
        return {"name": self.name, "mark": self.mark, "found": self.found, "remedy": self.remedy}


def ok(name: str, found: str, detail: str = "") -> Finding:
    """Return a finding that is in order."""
    return Finding(name, "ok", found, detail=detail)


def warn(name: str, found: str, remedy: str, detail: str = "") -> Finding:
    """Return a finding that does not stop the installation."""
    return Finding(name, "warn", found, remedy, detail)


def fail(
    name: str, found: str, remedy: str, detail: str = "", kind: type[WardroundError] = ProcessError
) -> Finding:
    """Return a finding that stops the installation; `kind` gives the exit code."""
    return Finding(name, "fail", found, remedy, detail, kind.exit_code)


def skipped(name: str, why: str) -> Finding:
    """Return a finding of a check that was not made."""
    return Finding(name, "skipped", why)


def failed(name: str, error: WardroundError, remedy: str = "") -> Finding:
    """Return an error as a finding: what was found and what to do are parts of its sentence.

    Args:
        name: Of the check.
        error: What was raised.
        remedy: What to do if the sentence does not say it.
    """
    found, own = split_sentence(error.message)
    return Finding(name, "fail", found, own or remedy, error.detail, error.exit_code)


def split_sentence(sentence: str) -> tuple[str, str]:
    """Return (what was found, what to do) of an error's sentence; the second is empty where it says nothing to do.

    Our errors say both, divided by a full stop, or by the last colon.
    """
    parts = _SENTENCE_END.split(sentence, maxsplit=1)
    if len(parts) == 2:
        return parts[0] + ".", parts[1]
    found, colon, remedy = sentence.rpartition(": ")
    return (found + ".", remedy[:1].upper() + remedy[1:]) if colon else (sentence, "")


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of the first failure, 0 if there is none."""
    return next((found.exit_code for found in findings if found.mark == "fail"), 0)


def to_document(site: str, findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the findings as a document that may be passed on.

    Args:
        site: The alias.
        findings: In order.
    """
    rows = list(findings)
    return {
        "schema_version": 1,
        "site": site,
        "ready": exit_code(rows) == 0,
        "exit_code": exit_code(rows),
        "checks": [found.to_mapping() for found in rows],
    }


def show(found: Finding, console: Console) -> None:
    """Print a line for a finding, and the remedy of what is not in order below it."""
    here = f" (here: {found.detail})" if found.detail else ""
    colour = _COLOURS[found.mark]
    line = f"[{colour}]{found.mark:<7}[/{colour}] {found.name:<{_WIDTH}}  {escape(found.found + here)}"
    console.print(line, highlight=False, soft_wrap=True)
    if found.remedy:
        text = f"{'':<{_WIDTH + 8}}  {escape('-> ' + found.remedy)}"
        console.print(text, highlight=False, soft_wrap=True)


def show_verdict(findings: Iterable[Finding], console: Console) -> None:
    """Print whether the installation is ready, and how many checks said what."""
    rows = list(findings)
    counts = [f"{sum(found.mark == mark for found in rows)} {word}" for mark, word in _WORDS.items()]
    verdict = "[bold red]not ready[/bold red]" if exit_code(rows) else "[bold green]ready[/bold green]"
    console.print(f"{verdict}: {', '.join(counts)}", highlight=False)
