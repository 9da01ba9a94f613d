"""The participation strip: rounds from left to right, sites from top to bottom, a colour for what happened."""

from __future__ import annotations

from itertools import groupby

from ops.plots import Chart, Key, drawing, dress, light, svg_text, tick_places
from ops.story import Round, Story

CONTRIBUTED, REPEATED, MISSING = "k2", "wait", "miss"
_LABELS = {CONTRIBUTED: "contributed", REPEATED: "contributed, asked again", MISSING: "missing"}
_GAPS_UP_TO = 60  # with more rounds a gap between two of them would only flicker
_LONGEST_NAME = 22
WIDTH = 10.0  # inches; it has the page's whole width


def strip(story: Story) -> Chart | None:
    """Return who took part in which round at a glance; None where nobody was missing and nothing repeated."""
    cycles = [item for item in story.cycles if item.asked or item.sites]
    states = {_state(item, alias) for item in cycles for alias in story.sites}
    if not states & {REPEATED, MISSING} and not any(item.again for item in cycles):
        return None
    title = "Who took part, by round"
    caption = "A row per hospital, a column per round; an empty place: not asked, or nothing was told."
    aliases = list(story.sites)
    gap = 0.06 if len(cycles) <= _GAPS_UP_TO else 0.0
    seen: set[str] = set()
    continued = {resume.round + 1 for resume in story.resumes if resume.round is not None} | {1}
    again = [place for place, item in enumerate(cycles) if item.again and item.number in continued]
    with drawing(size=(WIDTH, 0.75 + 0.24 * len(aliases))) as (figure, (panel,)):
        for row, alias in enumerate(aliases):
            for colour, start, length in _spans(cycles, alias, joined=gap == 0.0):
                seen.add(colour)
                panel.barh(
                    row,
                    length - gap,
                    height=0.78,
                    left=start - 0.5 + gap / 2,
                    color=light(colour),
                    linewidth=0,
                )
        for place in again:  # where an interrupted round was run again
            panel.axvline(place - 0.5, color=light("ink"), linewidth=1.2, linestyle=(0, (3, 2)))
        dress(panel, "", "round")
        panel.grid(visible=False)
        panel.set_xlim(-0.5, len(cycles) - 0.5)
        panel.set_ylim(len(aliases) - 0.5, -0.5)
        panel.set_yticks(range(len(aliases)), [_short(alias) for alias in aliases])
        tick_places(panel, ["end" if item.closing else str(item.number) for item in cycles])
        svg = svg_text(figure, "strip")
    keys = [Key(label, colour) for colour, label in _LABELS.items() if colour in seen]
    keys += [Key("after an interruption run again from here", "ink", line=True)] if again else []
    return Chart(
        title, caption, svg, f"{title}: a row per site; the table below says the same in words", keys
    )


def _state(item: Round, alias: str) -> str:
    """Return the colour of what a site did in a round, empty for nothing."""
    if alias in item.missing:
        return MISSING
    place = item.sites.get(alias)
    if alias in item.contributed or (place is not None and place.answered):
        return REPEATED if place is not None and place.retries else CONTRIBUTED
    return ""


def _spans(cycles: list[Round], alias: str, *, joined: bool) -> list[tuple[str, int, int]]:
    """Return (colour, first place, places) of a site; with `joined`, equal neighbours are one."""
    states = [(_state(item, alias), place) for place, item in enumerate(cycles)]
    if not joined:
        return [(colour, place, 1) for colour, place in states if colour]
    spans = []
    for colour, members in groupby(states, key=lambda pair: pair[0]):
        places = [place for _, place in members]
        if colour:
            spans.append((colour, places[0], len(places)))
    return spans


def _short(alias: str) -> str:
    return alias if len(alias) <= _LONGEST_NAME else alias[: _LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
