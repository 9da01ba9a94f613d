"""The runs as figures for machines: Prometheus' text format, and JSON.

Aliases, run names and figures only. Series of runs that rest for a week are left out, so that what a monitoring system
keeps does not grow with the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from ops.dashboard_rows import STATES, UNREAD, RunRow, SiteRow
from ops.dashboard_runs import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCHEMA = 1
RESTS_AFTER = 7 * 24 * 3600.0
MOST_RUNS = 100

Sample = tuple[dict[str, str], float]

_DASHBOARD = {
    "wardround_dashboard_runs": ("gauge", "Run folders that the dashboard shows."),
    "wardround_dashboard_look_timestamp_seconds": ("gauge", "When the runs folder was looked through last."),
    "wardround_dashboard_folder_readable": ("gauge", "1 if the runs folder can be read."),
}
_RUN = {
    "wardround_run_info": ("gauge", "Always 1; method, task and data of the run as labels."),
    "wardround_run_state": ("gauge", "1 for the state that the run is in, 0 for the others."),
    "wardround_run_round": ("gauge", "Round under way, or the last one; 0 before the first."),
    "wardround_run_rounds_completed": ("gauge", "Whole training rounds."),
    "wardround_run_rounds_planned": ("gauge", "Training rounds that there shall be in total."),
    "wardround_run_last_event_timestamp_seconds": ("gauge", "Time of the newest event."),
    "wardround_run_figure": ("gauge", "Main figure after the last evaluated round, mean over sites."),
    "wardround_run_unreadable_lines": ("gauge", "Lines of the event files that could not be read."),
}
_SITE = {
    "wardround_site_up": ("gauge", "1 if the site answered when it was last asked."),
    "wardround_site_failures_total": ("counter", "How often the site was missing from a round."),
    "wardround_site_bytes_up_total": ("counter", "Bytes that the site sent."),
    "wardround_site_bytes_down_total": ("counter", "Bytes that the site received."),
    "wardround_site_last_round_seconds": ("gauge", "Seconds between question and answer, of its last answer."),
}  # fmt: skip


def metrics(seen: Snapshot, now: float, silent_after: float) -> str:
    """Return the page for Prometheus (text format 0.0.4).

    Args:
        seen: The runs.
        now: Seconds since the epoch.
        silent_after: As `RunRow.state`.
    """
    told = [row for row in seen.rows if not row.problem and (row.age(now) or 0.0) < RESTS_AFTER][:MOST_RUNS]
    values: dict[str, list[Sample]] = {
        "wardround_dashboard_runs": [({}, len(seen.rows))],
        "wardround_dashboard_look_timestamp_seconds": [({}, seen.at)],
        "wardround_dashboard_folder_readable": [({}, float(not seen.gone))],
    }
    for row in told:
        for name, sample in _of_run(row, now, silent_after):
            values.setdefault(name, []).append(sample)
        for site in row.sites:
            for name, figure in _of_site(site):
                values.setdefault(name, []).append(({"run": row.name, "site": site.alias}, figure))
    lines: list[str] = []
    for name, (kind, meaning) in (_DASHBOARD | _RUN | _SITE).items():
        if name in values:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *_lines(name, values[name])]
    return "\n".join(lines) + "\n"


def _of_run(row: RunRow, now: float, silent_after: float) -> Iterator[tuple[str, Sample]]:
    run = {"run": row.name}
    yield "wardround_run_info", (run | {"method": row.method, "task": row.task, "data": row.data}, 1.0)
    state = row.state(now, silent_after)
    for name in STATES:
        yield "wardround_run_state", (run | {"state": name}, float(name == state))
    last = row.series[-1][1] if row.series else None
    figures = {
        "wardround_run_round": row.round,
        "wardround_run_rounds_completed": row.completed,
        "wardround_run_rounds_planned": row.planned,
        "wardround_run_last_event_timestamp_seconds": row.latest,
        "wardround_run_unreadable_lines": row.unreadable,
    }
    for name, value in figures.items():
        if value is not None:  # what is not known is no zero
            yield name, (run, float(value))
    if last is not None:
        yield "wardround_run_figure", (run | {"figure": row.figure, "model": row.model}, last)


def _of_site(site: SiteRow) -> Iterator[tuple[str, float]]:
    figures = {
        "wardround_site_up": int(site.up),
        "wardround_site_failures_total": site.failures,
        "wardround_site_bytes_up_total": site.bytes_up,
        "wardround_site_bytes_down_total": site.bytes_down,
        "wardround_site_last_round_seconds": site.seconds,
    }
    for name, value in figures.items():
        if value is not None:
            yield name, float(value)


def _lines(name: str, samples: Iterable[Sample]) -> Iterator[str]:
    for labels, value in samples:
        inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
        number = str(int(value)) if value == int(value) else repr(value)
        yield f"{name}{{{inside}}} {number}" if inside else f"{name} {number}"


def escaped(text: str) -> str:
    """Return a label's value as the text format wants it."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def document(seen: Snapshot, now: float, silent_after: float) -> str:
    """Return the runs as JSON.

    Args:
        seen: The runs.
        now: Seconds since the epoch.
        silent_after: As `RunRow.state`.
    """
    runs = [_run(row, now, silent_after) for row in seen.rows]
    whole = {
        "schema": SCHEMA,
        "now": now,
        "looked": seen.at,
        "readable": not seen.gone,
        "left_out": seen.left_out,
        "older": seen.older,
        "runs": runs,
    }
    return json.dumps(whole, separators=(",", ":"), allow_nan=False) + "\n"


def _run(row: RunRow, now: float, silent_after: float) -> dict[str, object]:
    if row.problem:
        return {"name": row.name, "state": UNREAD, "problem": row.problem, "last_event": row.latest}
    last = row.series[-1] if row.series else None
    return {
        "name": row.name,
        "state": row.state(now, silent_after),
        "code": row.code,
        "message": row.message,
        "method": row.method,
        "task": row.task,
        "data": row.data,
        "round": row.round,
        "closing": row.closing,
        "rounds_completed": row.completed,
        "rounds_planned": row.planned,
        "figure": None
        if last is None
        else {
            "name": row.figure,
            "model": row.model,
            "round": last[0],
            "mean": last[1],
            "sites": row.figured,
        },
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "bytes_on_the_wire": row.wire,
        "seconds": row.seconds(now, silent_after),
        "begun": row.begun,
        "last_event": row.latest,
        "last_event_age": row.age(now),
        "events": row.events,
        "unreadable_lines": row.unreadable,
        "sites": [
            {
                "alias": site.alias,
                "state": site.state,
                "code": site.code,
                "message": site.message,
                "since": site.since,
                "up": site.up,
                "failures": site.failures,
                "bytes_up": site.bytes_up,
                "bytes_down": site.bytes_down,
                "last_round_seconds": site.seconds,
            }
            for site in row.sites
        ],
    }
