"""The dashboard's pages: all runs of a folder, and one run's report with what is wrong now above it.

Pages are whole without JavaScript and load nothing; jinja2 escapes every value. The report is rendered as
`wardround report` does it, but for what must stay where it is: the typed command line (it may name folders of this
machine) and the hospitals' pictures.
"""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.errors import WardroundError
from ops import report, words
from ops.dashboard_rows import FAILED, MISSING, OK, REFUSED, RUNNING, SILENT, UNREAD, RunRow
from ops.dashboard_runs import Opened, Print, Snapshot
from ops.dashboard_since import troubles, without
from ops.report_faults import missed, run_name
from ops.story import Story

REFRESH_SECONDS = 10
REPORT_REFRESH_SECONDS = 30
LEAST_REPORT_SECONDS = 10.0
REPORT_PATIENCE = 5.0
"""A growing run's report is rendered at most every so many times the seconds that rendering it takes."""
MOST_REPORTS = 8
_TEMPLATES = Path(__file__).parent / "templates"
_TOP = "<main>\n"
_HEAD = "</head>"
_COMMAND = "The command line is not shown here, since it may name folders; `wardround report` at the coordinator shows it."
_PICTURES = "The pictures are not shown here."
_BADGES = {RUNNING: "run", OK: "ok", FAILED: "failed", SILENT: "open", UNREAD: "open"}
_CHIPS = {"takes part": "ok", "waited for": "run", MISSING: "failed", REFUSED: "failed"}
_WIDTH, _HEIGHT = 120.0, 26.0


@dataclass(frozen=True)
class Shown:
    """A page and the content policy that it needs."""

    html: str
    policy: str


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": words.size, "duration": words.duration, "moment": words.moment}
    environment.filters["without"] = lambda sentence, alias: without(alias, sentence)
    environment.globals |= {"badges": _BADGES, "chips": _CHIPS, "plural": words.plural}
    return environment


@lru_cache(maxsize=1)
def _style() -> str:
    return (_TEMPLATES / "dashboard.css").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def overview_policy() -> str:
    """Return the content policy of pages that are the dashboard's own: this one style, nothing else."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return _policy(f"'sha256-{digest}'")


def _policy(style: str) -> str:
    fixed = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; style-src {style}; {fixed}"


def overview(seen: Snapshot, now: float, silent_after: float, *, refresh: bool = True) -> Shown:
    """Return the page of all runs.

    Args:
        seen: The runs.
        now: Seconds since the epoch.
        silent_after: As `RunRow.state`.
        refresh: It asks for itself again every few seconds.
    """
    rows = [_line(row, now, silent_after) for row in seen.rows]
    states = [row.state(now, silent_after) for row in seen.rows]
    html = (
        _environment()
        .get_template("dashboard.html.j2")
        .render(
            style=Markup(_style()),
            rows=rows,
            counts={name: states.count(name) for name in (RUNNING, SILENT, FAILED, OK) if name in states},
            seen=seen,
            now=now,
            minutes=words.plural(round(silent_after / 60), "minute")
            if silent_after >= 60
            else words.duration(silent_after),
            refresh=REFRESH_SECONDS if refresh else 0,
        )
    )
    return Shown(html, overview_policy())


def _line(row: RunRow, now: float, silent_after: float) -> dict[str, object]:
    """Return what the template lays out of a run."""
    state, age = row.state(now, silent_after), row.age(now)
    last = row.series[-1] if row.series else None
    done = row.completed if row.planned else 0
    return {
        "row": row,
        "state": state,
        "word": {OK: "finished", SILENT: "silent", UNREAD: "not read"}.get(state, state),
        "age": age,
        "advice": words.advice(row.code) if state == FAILED else "",
        "doing": words.TRIAL_PHASES.get(row.phase, row.phase)
        if state == RUNNING and row.phase != "run"
        else "",
        "share": min(done / row.planned, 1.0) if row.planned else 0.0,
        "seconds": row.seconds(now, silent_after),
        "title": words.figure_title(row.figure) if row.figure else "",
        "value": words.figure(row.figure, last[1]) if last else words.NONE,
        "after": last[0] if last else None,
        "spark": spark(row.series),
        "troubled": [site for site in row.sites if site.state in (MISSING, REFUSED)],
    }


def spark(series: tuple[tuple[int, float], ...]) -> Markup:
    """Return a line of a figure over the rounds as inline SVG; empty for less than two points.

    Args:
        series: (round, value), in the order of rounds.
    """
    if len(series) < 2:
        return Markup("")
    first, last = series[0][0], series[-1][0]
    low, high = min(value for _, value in series), max(value for _, value in series)
    across, up = (_WIDTH - 6) / max(last - first, 1), (_HEIGHT - 6) / ((high - low) or 1.0)
    points = [
        (3 + (number - first) * across, _HEIGHT - 3 - (value - low) * up if high > low else _HEIGHT / 2)
        for number, value in series
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    told = f"rounds {first} to {last}: from {series[0][1]:.3g} to {series[-1][1]:.3g}"
    return Markup(  # figures of our own formatting only
        f'<svg class="spark" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{told}">'
        f'<polyline points="{path}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/></svg>'
    )


@dataclass
class _Rendered:
    print: Print
    html: str
    at: float
    took: float


class Reports:
    """Renders runs' reports, and keeps the last few.

    Args:
        render: Makes the page of a story.
        clock: Seconds; for how old a kept page is.
    """

    def __init__(
        self,
        render: Callable[[Story, Path], str] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._render = render or render_safely
        self._clock = clock
        self._kept: OrderedDict[str, _Rendered] = OrderedDict()

    def page(self, run: Opened, now: float, silent_after: float, *, refresh: bool = True) -> Shown:
        """Return a run's page: what is wrong now, then its report. To be called while the run is held.

        Args:
            run: The run.
            now: Seconds since the epoch.
            silent_after: As `RunRow.state`.
            refresh: While the run goes on, the page asks for itself again.
        """
        kept = self._report(run)
        silent = run.row.silent_since(now, silent_after)
        going = run.row.state(now, silent_after) in (RUNNING, SILENT)
        values = {
            "line": _line(run.row, now, silent_after),
            "row": run.row,
            "now": now,
            "troubles": troubles(run.story, run.since, now, silent, run_name(run.folder)),
            "missed": missed(run.story),
            "going": going,
            "behind": kept.print != run.print,
            "old": max(self._clock() - kept.at, 0.0),
            "refresh": REPORT_REFRESH_SECONDS if refresh and going else 0,
        }
        template = _environment().get_template("dashboard_run.html.j2").module
        head, top = (str(getattr(template, part)(values)) for part in ("head", "top"))
        html = kept.html.replace(_HEAD, head + _HEAD, 1).replace(_TOP, _TOP + top, 1)
        return Shown(html, _policy("'unsafe-inline'"))  # the report's charts carry styles of their own

    def _report(self, run: Opened) -> _Rendered:
        kept = self._kept.get(run.row.name)
        if kept is None or (kept.print != run.print and self._due(kept)):
            began = self._clock()
            html = self._render(run.story, run.folder)
            if _TOP not in html or _HEAD not in html:
                raise WardroundError("The report has no place for what the dashboard adds to it.")
            kept = _Rendered(run.print, html, self._clock(), self._clock() - began)
            self._kept[run.row.name] = kept
        self._kept.move_to_end(run.row.name)
        while len(self._kept) > MOST_REPORTS:
            self._kept.popitem(last=False)
        return kept

    def _due(self, kept: _Rendered) -> bool:
        return self._clock() - kept.at >= max(LEAST_REPORT_SECONDS, REPORT_PATIENCE * kept.took)


def render_safely(story: Story, folder: Path) -> str:
    """Return a story's report without the typed command line and without the hospitals' pictures.

    Args:
        story: What is told.
        folder: The run folder; only its name gets onto the page.
    """
    values = report.context(story, folder)
    if values["command"]:
        values["command"] = _COMMAND
    for kind in ("pictures", "styles"):  # their file names may name cases
        values[kind] = [(alias, [], _PICTURES) for alias, _, _ in values[kind]]
    return _environment().get_template("report.html.j2").render(values)
