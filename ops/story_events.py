"""What each event adds to a story (`ops/story.py`): one small function per event name.

A field that is absent or of the wrong type adds nothing; it never becomes a zero. The events that make attempts,
interruptions and processes are in `ops/story_attempts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ops import story_attempts as attempts
from ops.story import DIRECTIONS, Activity, Figures, Notice, Round, SavedModel, Story, Transport, Witness
from ops.story_fields import (
    Event,
    aliases,
    counts,
    failure_of,
    first_of,
    integer,
    mapping,
    number,
    numbers,
    place_of,
    round_number,
    round_of,
    site_of,
    text,
)
from ops.story_masks import masks_of
from ops.story_network import network_of

_MOST_RETRIES = 1_000_000
_LEDGER = re.compile(r"(\d{1,15}):([0-9a-f]{64})")


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
    attempts.heard(story, event)


def fill_from_config(story: Story, document: dict[str, Any]) -> None:
    """Take what the run folder's config.json says; what events said already stays."""
    story.config = mapping(document.get("config"))
    story.notes = {key: value for key, value in document.items() if key != "config"}
    story.method = story.method or text(story.config, "method")
    story.task = story.task or text(mapping(story.config.get("data")), "task")
    story.data = story.data or text(document, "data_name")
    story.runtime = story.runtime or text(document, "runtime")
    story.planned = first_of(story.planned, integer(mapping(story.config.get("rounds")), "rounds"))
    story.seed = first_of(story.seed, integer(story.config, "seed"))
    for alias in aliases(story.config.get("sites")):
        site_of(story, alias)


def _site_ready(story: Story, event: Event) -> None:
    if not text(event, "site"):
        return
    site = site_of(story, text(event, "site"))
    site.ready, site.refused = True, None
    story.refused.pop(site.alias, None)
    site.cases = counts(event.get("cases"))
    site.device, site.software = text(event, "device"), text(event, "software")


def _site_refused(story: Story, event: Event) -> None:
    alias = text(event, "site") or "a site without a name"
    story.refused[alias] = failure_of(event)
    if alias in story.sites:
        story.sites[alias].refused = story.refused[alias]


def _round_end(story: Story, event: Event) -> None:
    if (item := round_of(story, event)) is None:
        return
    item.ended = True
    item.closing = event.get("closing") is True
    for key in ("seconds", "slowest", "overhead", "loss"):
        setattr(item, key, number(event, key))
    item.contributed = aliases(event.get("sites"))
    item.said_missing = aliases(event.get("missing"))
    item.cases = counts(event.get("cases"))
    for alias in (*item.contributed, *item.said_missing):
        site_of(story, alias)


def _site_asked(story: Story, event: Event) -> None:
    if place := place_of(story, event):
        place.asked = True


def _site_reply(story: Story, event: Event) -> None:
    if place := place_of(story, event):
        place.answered, place.failure = True, None
        place.waited, place.local = number(event, "seconds"), number(event, "local")
        place.phases, place.relay = numbers(event.get("phases")), numbers(event.get("relay"))
        place.cases, place.loss = integer(event, "cases"), number(event, "loss")
        _note_ledger(story, event)


def _note_ledger(story: Story, event: Event) -> None:
    head = _LEDGER.fullmatch(text(event, "ledger"))
    if head:
        site = site_of(story, text(event, "site"))
        site.witness = Witness(round_number(event), int(head[1]), head[2])


def _site_retry(story: Story, event: Event) -> None:
    if place := place_of(story, event):
        place.asked = True
        place.retries = max(place.retries + 1, min(integer(event, "attempt") or 1, _MOST_RETRIES))
        place.trouble = failure_of(event)


def _site_late(story: Story, event: Event) -> None:
    found, alias = round_number(event), text(event, "site")
    if found is None or not alias:
        return
    site_of(story, alias)
    # A round that is over keeps its place: the answer belongs to it, whoever runs by now.
    item = story.rounds.setdefault(found, Round(found, attempt=len(story.servings)))
    item.site(alias).late += 1


def _site_failed(story: Story, event: Event) -> None:
    if place := place_of(story, event):
        place.failure = failure_of(event)


def _bytes(story: Story, event: Event) -> None:
    direction, sizes = text(event, "direction"), counts(event.get("kinds"))
    if direction not in DIRECTIONS or not sizes or not (place := place_of(story, event)):
        return
    kinds = place.bytes.setdefault(direction, {})
    for kind, size in sizes.items():
        kinds[kind] = kinds.get(kind, 0) + size


def _transport(story: Story, event: Event) -> None:
    alias = text(event, "site")
    down, up, calls = integer(event, "down"), integer(event, "up"), integer(event, "calls") or 0
    if not alias or down is None or up is None:
        return
    site = site_of(story, alias)
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
    values = numbers(event.get("values"))
    if not alias or found is None or not split or not model or not values:
        return
    if not 0 <= found <= max(story.rounds, default=story.planned or 0):  # a site said it, and it cannot be
        return
    primary = text(event, "primary") or next(iter(values))
    figures = Figures(found, split, model, integer(event, "cases"), values, primary)
    site_of(story, alias).figures[found, split, model] = figures


def _phase(story: Story, event: Event) -> None:
    alias, phase = text(event, "site"), text(event, "phase")
    if not alias or not phase:
        return
    site = site_of(story, alias)
    before, when = site.activity, number(event, "t")
    same = before.phase == phase
    site.activity = Activity(
        phase,
        first_of(integer(event, "round"), before.round),
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
        site_of(story, alias).slices = integer(event, "count")


def _styles_saved(story: Story, event: Event) -> None:
    alias = text(event, "site")
    if alias:
        site_of(story, alias).styles = integer(event, "count")


def _method_figures(story: Story, event: Event) -> None:
    masks, network = masks_of(event.get("figures")), network_of(event.get("figures"))
    if (masks is None and network is None) or (item := round_of(story, event)) is None:
        return
    item.masks = item.masks if masks is None else masks
    item.network = item.network if network is None else network


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
    "trial.start": attempts.trial_start,
    "trial.phase": attempts.trial_phase,
    "trial.end": attempts.trial_end,
    "process.start": attempts.process_start,
    "process.ready": attempts.process_ready,
    "process.exit": attempts.process_exit,
    "run.start": attempts.run_start,
    "run.end": attempts.run_end,
    "run.resume": attempts.run_resume,
    "process.restart": attempts.process_restart,
    "checkpoint": attempts.checkpoint,
    "checkpoint.refused": attempts.checkpoint_refused,
    "site.joined": attempts.site_joined,
    "site.retry": _site_retry,
    "site.late": _site_late,
    "site.ready": _site_ready,
    "site.refused": _site_refused,
    "round.start": attempts.round_start,
    "round.end": _round_end,
    "site.asked": _site_asked,
    "site.reply": _site_reply,
    "site.failed": _site_failed,
    "bytes": _bytes,
    "transport": _transport,
    "metric": _metric,
    "memory": attempts.memory,
    "phase": _phase,
    "model.saved": _model_saved,
    "slices.saved": _slices_saved,
    "styles.saved": _styles_saved,
    "method.figures": _method_figures,
    "warning": _warning,
}
