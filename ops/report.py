"""report.html: a run on one page that needs nothing but a browser.

One file: style and curves are inside, nothing is loaded from a network and no script runs (the page's own content
policy forbids both). It holds figures, aliases and safe sentences; example slices are only linked, so handing on the
page hands on no picture. The same events give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from common.errors import ConfigError
from ops import report_faults as faults
from ops import report_view as view
from ops import words
from ops.plots import COLOURS, charts, site_mark
from ops.plots_masks import mask_charts
from ops.plots_network import network_charts
from ops.plots_strip import strip
from ops.report_against import beside, read_others
from ops.story import Story
from ops.story_reader import read_story

REPORT_FILE = "report.html"


def write_report(run_dir: Path, against: Sequence[Path] = ()) -> Path:
    """Write a run folder's report.html from its event files, whole or not at all.

    Args:
        run_dir: The run folder; the run may still be going, or have been cut off.
        against: Other run folders, whose figures by hospital stand beside this run's.

    Returns:
        The page's path.

    Raises:
        ConfigError: The folder holds no run, the page cannot be written there, or another run cannot stand beside it.
    """
    story = read_story(run_dir)
    page = render(story, run_dir, read_others(against, story))
    path = run_dir / REPORT_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written into the run folder ({error.strerror}). Free space or allow writing there, "
            "then run `wardround report RUN_DIR`.", detail=f"{path}: {error}",
        ) from error  # fmt: skip
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def render(story: Story, folder: Path, others: Sequence[Story] = ()) -> str:
    """Return the page of a story.

    Args:
        story: What is told.
        folder: The run folder, where example slices are looked for.
        others: Runs over the same data (`read_others`).
    """
    return _template().render(context(story, folder, others))


def context(story: Story, folder: Path, others: Sequence[Story] = ()) -> dict[str, Any]:
    """Return what the template lays out."""
    notes = story.notes
    title = str(notes.get("title") or story.data or story.run or "Run")
    failure = story.verdict.failure if story.verdict else None
    software = notes.get("software")
    measured = [alias for alias, site in story.sites.items() if site.transport is not None]
    return {
        "title": title,
        "subtitle": _subtitle(story),
        "note": str(notes.get("note") or ""),
        "command": str(notes.get("command") or ""),
        "software": software if isinstance(software, dict) else {},
        "palette": COLOURS,
        "badge": view.badge(story),
        "code": failure.code if failure else "",
        "advice": words.advice(failure.code) if failure else "",
        "resume": faults.resume_command(faults.run_name(folder)) if story.resumable else "",
        "effect": faults.resume_effect(story),
        "facts": view.facts(story),
        "marks": {alias: site_mark(story, alias) for alias in story.sites},
        "bars": view.bars(story),
        "cards": view.cards(story),
        "charts": charts(story),
        "masks": mask_charts(story),
        "network": network_charts(story),
        "beside": beside(story, others),
        "others": [other.run for other in others],
        "results": view.result_tables(story),
        "place": _place(story),
        "own": len(story.models_seen) > 1,
        "figure_notes": _figure_notes(story),
        "strip": strip(story),
        "participation": faults.participation(story),
        "missed": faults.missed(story),
        "absences": faults.absences(story),
        "repetitions": faults.repetitions(story),
        "interruptions": faults.interruptions(story),
        "times": faults.round_times(story),
        "witnesses": faults.witnesses(story),
        "warnings": story.warnings,
        "traffic": view.traffic(story),
        "wire": len(measured) == len(story.sites),
        "pictures": view.gallery(story, folder),
        "styles": view.gallery(story, folder, "styles"),
        "processes": view.processes(story),
        "models": [
            {"name": item.name, "size": words.size(item.bytes), "round": item.round, "site": item.site}
            for item in sorted(story.models.values(), key=lambda item: item.name)
        ],
        "configuration": view.configuration(story),
        "run": story.run,
        "events": story.events,
        "unreadable": story.unreadable,
    }


@lru_cache(maxsize=1)
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def _subtitle(story: Story) -> str:
    if not story.sites:
        return ""
    with_cases = [site for site in story.sites.values() if site.cases]
    total = sum(sum(site.cases.values()) for site in with_cases)
    cases = f" with {words.count(total)} cases" if len(with_cases) == len(story.sites) else ""
    return f"{words.plural(len(story.sites), 'hospital')}{cases}: " + ", ".join(story.sites)


def _place(story: Story) -> str:
    place = story.final_place()
    if place is None:
        return ""
    split, number = place
    after = f"after round {number}" if number else "of the initial model"
    return f"On {split} cases, {after}."


def _figure_notes(story: Story) -> str:
    names = {
        words.base(name)
        for site in story.sites.values()
        for item in site.figures.values()
        for name in item.values
    }
    return " ".join(text for name, text in words.FIGURE_NOTES.items() if name in names)
