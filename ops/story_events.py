"""What each event adds to a story (`ops/story.py`): one small function per event name.

A field that is absent or of the wrong type adds nothing; it never becomes a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ops.story import (
    DIRECTIONS,
    Activity,
    Failure,
    Figures,
    Notice,
    Process,
    Round,
    SavedModel,
    Site,
    SiteRound,
    Story,
    Transport,
    Verdict,
)

Event = dict[str, Any]
MOST_ROUNDS = 1_000_000
LARGEST = 1e15  # beyond it nothing is seconds, bytes or a figure, and a curve could not be drawn


def number(event: Mapping[str, Any], key: str) -> float | None:
    """Return a number of an event, None if there is none that can be meant."""
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and abs(value) <= LARGEST else None


def integer(event: Mapping[str, Any], key: str) -> int | None:
    """Return a whole number of an event, None if there is none."""
    value = event.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def text(event: Mapping[str, Any], key: str) -> str:
    """Return a text of an event, empty if there is none."""
    value = event.get(key)
    return value if isinstance(value, str) else ""


def aliases(value: Any) -> list[str]:
    """Return a list of aliases; anything else gives none."""
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list) else []


def add(story: Story, event: Event) -> None:
    """Add one event to a story. An event of unknown name is counted and left alone."""
    when = number(event, "t")
    if when is not None:
        story.begun = when if story.begun is None else min(story.begun, when)
        story.latest = when if story.latest is None else max(story.latest, when)
    story.events += 1
    handler = _HANDLERS.get(event["event"])
    if handler is not None:
        handler(story, event)


def fill_from_config(story: Story, document: dict[str, Any]) -> None:
    """Take what the run folder's config.json says; what events said already stays."""
    story.config = _mapping(document.get("config"))
    story.notes = {key: value for key, value in document.items() if key != "config"}
    story.method = story.method or text(story.config, "method")
    story.task = story.task or text(_mapping(story.config.get("data")), "task")
    story.data = story.data or text(document, "data_name")
    story.runtime = story.runtime or text(document, "runtime")
    story.planned = _or(story.planned, integer(_mapping(story.config.get("rounds")), "rounds"))
    story.seed = _or(story.seed, integer(story.config, "seed"))
    for alias in aliases(story.config.get("sites")):
        _site(story, alias)


def _or(first: Any, second: Any) -> Any:
    return second if first is None else first


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    source = _mapping(value)
    return {key: found for key in source if (found := number(source, key)) is not None}


def _counts(value: Any) -> dict[str, int]:
    source = _mapping(value)
    return {key: found for key in source if (found := integer(source, key)) is not None and found >= 0}


def _site(story: Story, alias: str) -> Site:
    return story.sites.setdefault(alias, Site(alias))


def _round(story: Story, event: Event) -> Round | None:
    found = integer(event, "round")
    if found is None or not 1 <= found <= MOST_ROUNDS:
        return None
    return story.rounds.setdefault(found, Round(found))


def _failure(event: Event) -> Failure:
    return Failure(text(event, "code") or "unknown", text(event, "message") or "No reason was recorded.")


def _verdict(event: Event) -> Verdict:
    ok = event.get("verdict") == "ok"
    return Verdict(ok, number(event, "seconds"), integer(event, "rounds"), None if ok else _failure(event))


def _trial_start(story: Story, event: Event) -> None:
    story.trial = True
    story.method = text(event, "method") or story.method
    story.task = text(event, "task") or story.task
    story.data = text(event, "data") or story.data
    story.runtime = text(event, "runtime") or story.runtime
    story.planned = _or(integer(event, "rounds"), story.planned)
    for alias in aliases(event.get("sites")):
        _site(story, alias)


def _trial_phase(story: Story, event: Event) -> None:
    story.trial = True
    story.phase = text(event, "phase")


def _trial_end(story: Story, event: Event) -> None:
    story.trial_end = _verdict(event)


def _process(story: Story, event: Event) -> Process | None:
    name = text(event, "name")
    if not name:
        return None
    process = story.processes.setdefault(name, Process(name))
    process.site = text(event, "site") or process.site
    return process


def _process_start(story: Story, event: Event) -> None:
    if process := _process(story, event):
        process.started, process.exit_code, process.ready_seconds = True, None, None


def _process_ready(story: Story, event: Event) -> None:
    if process := _process(story, event):
        process.ready_seconds = number(event, "seconds")


def _process_exit(story: Story, event: Event) -> None:
    if process := _process(story, event):
        process.exit_code = integer(event, "code")
        process.expected = event.get("expected") is True


def _memory(story: Story, event: Event) -> None:
    name, alias = text(event, "name"), text(event, "site")
    if name == "worker" and alias and story.runtime != "simulation":  # one worker serves all in a simulation
        event = {**event, "name": f"worker-{alias}"}
    process = _process(story, event)
    for key in ("peak", "gpu"):
        found = number(event, key)
        if process and found is not None:
            setattr(process, key, max(found, getattr(process, key) or 0.0))


def _run_start(story: Story, event: Event) -> None:
    story.method = text(event, "method") or story.method
    story.task = text(event, "task") or story.task
    story.run = text(event, "run") or story.run
    story.planned = _or(integer(event, "rounds"), story.planned)
    story.seed = _or(integer(event, "seed"), story.seed)
    story.parameters = _or(integer(event, "parameters"), story.parameters)
    story.model_bytes = _or(integer(event, "bytes"), story.model_bytes)
    story.run_end = None  # a resumed run has no verdict yet


def _run_end(story: Story, event: Event) -> None:
    story.run_end = _verdict(event)


def _site_ready(story: Story, event: Event) -> None:
    if not text(event, "site"):
        return
    site = _site(story, text(event, "site"))
    site.ready, site.refused = True, None
    story.refused.pop(site.alias, None)
    site.cases = _counts(event.get("cases"))
    site.device, site.software = text(event, "device"), text(event, "software")


def _site_refused(story: Story, event: Event) -> None:
    alias = text(event, "site") or "a site without a name"
    story.refused[alias] = _failure(event)
    if alias in story.sites:
        story.sites[alias].refused = story.refused[alias]


def _round_start(story: Story, event: Event) -> None:
    if (item := _round(story, event)) is None:
        return
    item.closing = event.get("closing") is True
    item.asked = aliases(event.get("sites"))
    item.ended, item.contributed, item.said_missing = False, [], []
    for alias in item.asked:
        _site(story, alias)
        item.site(alias).failure = None  # a resumed run asks again


def _round_end(story: Story, event: Event) -> None:
    if (item := _round(story, event)) is None:
        return
    item.ended = True
    item.closing = event.get("closing") is True
    for key in ("seconds", "slowest", "overhead", "loss"):
        setattr(item, key, number(event, key))
    item.contributed = aliases(event.get("sites"))
    item.said_missing = aliases(event.get("missing"))
    item.cases = _counts(event.get("cases"))
    for alias in (*item.contributed, *item.said_missing):
        _site(story, alias)


def _place(story: Story, event: Event) -> SiteRound | None:
    """Return the site's place in the event's round, making room for it."""
    alias, item = text(event, "site"), _round(story, event)
    if item is None or not alias:
        return None
    _site(story, alias)
    return item.site(alias)


def _site_asked(story: Story, event: Event) -> None:
    if place := _place(story, event):
        place.asked = True


def _site_reply(story: Story, event: Event) -> None:
    if place := _place(story, event):
        place.answered, place.failure = True, None
        place.waited, place.local = number(event, "seconds"), number(event, "local")
        place.phases, place.relay = _numbers(event.get("phases")), _numbers(event.get("relay"))
        place.cases, place.loss = integer(event, "cases"), number(event, "loss")


def _site_failed(story: Story, event: Event) -> None:
    if place := _place(story, event):
        place.failure = _failure(event)


def _bytes(story: Story, event: Event) -> None:
    direction, counts = text(event, "direction"), _counts(event.get("kinds"))
    if direction not in DIRECTIONS or not counts or not (place := _place(story, event)):
        return
    kinds = place.bytes.setdefault(direction, {})
    for kind, size in counts.items():
        kinds[kind] = kinds.get(kind, 0) + size


def _transport(story: Story, event: Event) -> None:
    alias = text(event, "site")
    down, up, calls = integer(event, "down"), integer(event, "up"), integer(event, "calls") or 0
    if not alias or down is None or up is None:
        return
    site = _site(story, alias)
    total = site.transport = site.transport or Transport()
    last = total.last
    if down < last[0] or up < last[1]:  # its SuperNode was started again and counts from nothing
        last = (0, 0, 0)
    total.down += down - last[0]
    total.up += up - last[1]
    total.calls += max(calls - last[2], 0)
    total.last = (down, up, calls)


def _metric(story: Story, event: Event) -> None:
    alias, found = text(event, "site"), integer(event, "round")
    split, model = text(event, "split"), text(event, "model")
    values = _numbers(event.get("values"))
    if not alias or found is None or not split or not model or not values:
        return
    if not 0 <= found <= max(story.rounds, default=story.planned or 0):  # a site said it, and it cannot be
        return
    primary = text(event, "primary") or next(iter(values))
    figures = Figures(found, split, model, integer(event, "cases"), values, primary)
    _site(story, alias).figures[found, split, model] = figures


def _phase(story: Story, event: Event) -> None:
    alias, phase = text(event, "site"), text(event, "phase")
    if not alias or not phase:
        return
    site = _site(story, alias)
    before, when = site.activity, number(event, "t")
    same = before.phase == phase
    site.activity = Activity(
        phase,
        _or(integer(event, "round"), before.round),
        integer(event, "step"),
        integer(event, "steps") or None,
        before.since if same else when,
    )


def _model_saved(story: Story, event: Event) -> None:
    name = text(event, "name")
    if name:
        story.models[name] = SavedModel(
            name, integer(event, "bytes"), integer(event, "round"), text(event, "site")
        )


def _slices_saved(story: Story, event: Event) -> None:
    alias = text(event, "site")
    if alias:
        _site(story, alias).slices = integer(event, "count")


def _warning(story: Story, event: Event) -> None:
    story.warnings.append(
        Notice(
            text(event, "code") or "unknown",
            text(event, "message"),
            text(event, "site"),
            integer(event, "round"),
        )
    )


_HANDLERS: dict[str, Callable[[Story, Event], None]] = {
    "trial.start": _trial_start,
    "trial.phase": _trial_phase,
    "trial.end": _trial_end,
    "process.start": _process_start,
    "process.ready": _process_ready,
    "process.exit": _process_exit,
    "run.start": _run_start,
    "run.end": _run_end,
    "site.ready": _site_ready,
    "site.refused": _site_refused,
    "round.start": _round_start,
    "round.end": _round_end,
    "site.asked": _site_asked,
    "site.reply": _site_reply,
    "site.failed": _site_failed,
    "bytes": _bytes,
    "transport": _transport,
    "metric": _metric,
    "memory": _memory,
    "phase": _phase,
    "model.saved": _model_saved,
    "slices.saved": _slices_saved,
    "warning": _warning,
}
