"""Reading the fields of an event, and finding the place in a story that it belongs to.

A field that is absent or of the wrong type gives None or nothing; it never becomes a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ops.story import NO_REASON, Failure, Round, Site, SiteRound, Story, Verdict

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


def first_of(first: Any, second: Any) -> Any:
    """Return the first value, or the second where the first is None."""
    return second if first is None else first


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping; anything else gives an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """Return the numbers of a mapping."""
    source = mapping(value)
    return {key: found for key in source if (found := number(source, key)) is not None}


def counts(value: Any) -> dict[str, int]:
    """Return the whole numbers of a mapping that count something."""
    source = mapping(value)
    return {key: found for key in source if (found := integer(source, key)) is not None and found >= 0}


def site_of(story: Story, alias: str) -> Site:
    """Return a site of the story, making room for it."""
    return story.sites.setdefault(alias, Site(alias))


def round_number(event: Event) -> int | None:
    """Return the round that an event is about, None if it names none that can be."""
    found = integer(event, "round")
    return found if found is not None and 1 <= found <= MOST_ROUNDS else None


def round_of(story: Story, event: Event) -> Round | None:
    """Return the event's round, making room for it; None if the event names none that can be.

    A server that began again runs a round from its beginning: what an earlier attempt left of it is put aside.
    """
    found = round_number(event)
    if found is None:
        return None
    item = story.rounds.get(found)
    if item is not None and item.attempt == len(story.servings):
        return item
    put_aside(story, found)
    again = sum(1 for old in story.replaced if old.number == found and old.started)
    item = story.rounds[found] = Round(found, attempt=len(story.servings), again=again)
    return item


def put_aside(story: Story, first: int) -> None:
    """Take the rounds from `first` on out of the story: they are run again, and only their bytes still count."""
    gone = [number for number in sorted(story.rounds) if number >= first]
    story.replaced += [story.rounds.pop(number) for number in gone]
    if not gone:
        return
    for site in story.sites.values():  # round k's result is evaluated in cycle k + 1
        site.figures = {key: item for key, item in site.figures.items() if item.round < first - 1}


def failure_of(event: Event) -> Failure:
    """Return the event's code and sentence."""
    return Failure(text(event, "code") or NO_REASON[0], text(event, "message") or NO_REASON[1])


def verdict_of(event: Event) -> Verdict:
    """Return the event's verdict."""
    ok = event.get("verdict") == "ok"
    return Verdict(ok, number(event, "seconds"), integer(event, "rounds"), None if ok else failure_of(event))


def place_of(story: Story, event: Event) -> SiteRound | None:
    """Return the site's place in the event's round, making room for it."""
    alias, item = text(event, "site"), round_of(story, event)
    if item is None or not alias:
        return None
    site_of(story, alias)
    return item.site(alias)
