"""What the report page shows, as plain words and numbers in words: the template only lays it out."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.federation import is_alias
from ops import words
from ops.plots import site_colour
from ops.story import DIRECTIONS, DOWN, UP, Story

MOST_PICTURES = 8
MOST_COLUMNS = 14
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".svg"})


@dataclass(frozen=True)
class Card:
    """A key figure: its name, its value, and one line on how to read it."""

    title: str
    value: str
    note: str = ""


@dataclass
class Table:
    """A table of words.

    Attributes:
        head: Column titles; an entry (title, n) spans n columns of `second`.
        second: Second row of titles, if there is one.
        rows: Cells by row; each (words, CSS class).
        foot: Closing rows.
        tips: What a cell says where it is pointed at, by (row, column).
    """

    head: list[tuple[str, int]]
    rows: list[list[tuple[str, str]]]
    second: list[str] = field(default_factory=list)
    foot: list[list[tuple[str, str]]] = field(default_factory=list)
    tips: dict[tuple[int, int], str] = field(default_factory=dict)

    def right(self, column: int) -> bool:
        """Tell whether a column holds numbers, which stand on the right."""
        return any(kind.startswith("num") for row in self.rows for _, kind in row[column : column + 1])


@dataclass(frozen=True)
class Bar:
    """One site's result: words, and shares of the bar's width, for each model."""

    site: str
    colour: str
    parts: list[tuple[str, str, float]]


@dataclass(frozen=True)
class Picture:
    """An example slice: relative address and caption."""

    address: str
    caption: str


def badge(story: Story) -> tuple[str, str, str]:
    """Return (CSS class, word, sentence) of the verdict."""
    verdict = story.verdict
    nth = f"Attempt {len(story.attempts)}: " if len(story.attempts) > 1 else ""
    if verdict is None:
        told = "No verdict was told: the run is still going, or was cut off. This page shows what was written until then."
        return "open", "no verdict", nth + told
    if verdict.ok:
        return "ok", "completed", f"{words.plural(len(story.completed), 'round')} completed."
    failure = verdict.failure
    assert failure is not None
    return "failed", "failed", nth + failure.message


def facts(story: Story) -> list[tuple[str, str]]:
    """Return the run's facts, name and value, without those that are not known."""
    planned = "" if story.planned is None else f" of {story.planned}"
    params = story.config.get("params")
    tuned = ", ".join(f"{key} = {value}" for key, value in params.items()) if isinstance(params, dict) else ""
    size = words.size(story.model_bytes) if story.model_bytes is not None else ""
    pairs = [
        ("Method", story.method + (f" ({tuned})" if tuned and story.method else "")),
        ("Task", story.task),
        ("Data", story.data),
        ("Hospitals", words.count(len(story.sites)) if story.sites else ""),
        ("Rounds", f"{len(story.completed)}{planned}"),
        ("Attempts", _attempts(story)),
        ("Seed", "" if story.seed is None else str(story.seed)),
        (
            "Model",
            f"{words.count(story.parameters)} trainable values, {size}" if story.parameters and size else "",
        ),
        ("Runtime", words.RUNTIMES.get(story.runtime, story.runtime)),
        ("Started", str(story.notes.get("started", "")).replace("T", " ").replace("Z", " UTC")),
        ("Run", story.run),
    ]
    return [(name, value) for name, value in pairs if value]


def _attempts(story: Story) -> str:
    """Return how often the run was tried, and after which rounds it was continued; empty for one straight run."""
    if len(story.attempts) < 2 and not story.resumes:
        return ""
    after = [f"round {item.round}" for item in story.resumes if item.round]
    return str(max(len(story.attempts), 1)) + (f", continued after {words.joined(after)}" if after else "")


def cards(story: Story) -> list[Card]:
    """Return the key figures; what was not measured says so."""
    return [*_result_cards(story), *_cost_cards(story)]


def _result_cards(story: Story) -> list[Card]:
    place, own, primary = story.final_place(), story.own_model, story.primary
    title = words.figure_title(primary or "main figure")
    if place is None:
        return [Card("Result", words.NOT_MEASURED, "No site told a figure.")]
    split, number = place
    finals = story.finals(own)
    mean = statistics.fmean(finals.values()) if finals else None
    sd = statistics.stdev(finals.values()) if len(finals) > 1 else None
    where = f"{split} cases, after round {number}" if number else f"{split} cases, initial model"
    value = words.figure(primary, mean) + (f" ± {words.figure(primary, sd)}" if sd is not None else "")
    spread = "mean ± standard deviation over" if sd is not None else "of"
    found = [
        Card(
            f"{title}, {words.MODELS.get(own, own)}",
            value,
            f"{spread} {words.plural(len(finals), 'site')}; {where}",
        )
    ]
    worst = story.worst(own)
    if worst is not None and len(finals) > 1:
        found.append(
            Card("Worst site", words.figure(primary, worst[1]), f"{worst[0]}, {words.MODELS.get(own, own)}")
        )
    both = {alias: value for alias, value in story.finals("global").items() if alias in finals}
    if own == "personal" and both:
        gains = [finals[alias] - value for alias, value in both.items()]
        text = f"own minus global model, mean over {words.plural(len(gains), 'site')}"
        found.append(
            Card(
                "Gain of the personal model",
                words.figure(primary, sum(gains) / len(gains), signed=True),
                text,
            )
        )
    return found


def _cost_cards(story: Story) -> list[Card]:
    wire = all(story.total(direction, wire=True) is not None for direction in DIRECTIONS)
    what = (
        "on the wire, all sites, with TLS and Flower"
        if wire
        else "messages of all sites; the wire was not measured"
    )
    down, up = (story.total(direction, wire=wire) for direction in (DOWN, UP))
    moved = (
        f"↑ {words.size(up)}  ↓ {words.size(down)}"
        if up is not None or down is not None
        else words.NOT_MEASURED
    )
    wall = words.NOT_MEASURED if story.seconds is None else words.duration(story.seconds)
    notes = [f"sum of {len(story.attempts)} attempts"] if len(story.attempts) > 1 else []
    if story.trial_end and story.server_seconds:
        notes.append(f"of it {words.duration(story.server_seconds)} in the server's run")
    inside = "; ".join(notes)
    overheads = story.overheads
    median = words.duration(statistics.median(overheads)) if overheads else words.NOT_MEASURED
    over = f"a round beyond the slowest site's own work, median of {words.plural(len(overheads), 'round')}"
    return [
        Card("Bytes moved", moved, what if moved != words.NOT_MEASURED else ""),
        Card("Wall time", wall, inside or ("from start to verdict" if wall != words.NOT_MEASURED else "")),
        Card("Framework overhead", median, over if overheads else ""),
    ]


def bars(story: Story) -> list[Bar]:
    """Return each site's result for each model; empty where figures have no common scale."""
    if not words.bounded(story.primary) or story.final_place() is None:
        return []
    rows = []
    for alias in story.sites:
        parts = []
        for model in story.models_seen:
            found = story.final(alias, model)
            if found is not None and found.main is not None:
                share = min(max(found.main, 0.0), 1.0) * 100
                parts.append((words.MODELS.get(model, model), words.figure(story.primary, found.main), share))
        rows.append(Bar(alias, site_colour(story, alias), parts))
    return rows


def result_tables(story: Story, *, apart: bool = False, without: frozenset[str] = frozenset()) -> list[Table]:
    """Return the final figures by site, model and class.

    Args:
        story: What is told.
        apart: One table per figure; done anyway where one table would have too many columns.
        without: Figures to leave out.
    """
    rows = [
        (alias, model, found)
        for alias in story.sites
        for model in story.models_seen
        if (found := story.final(alias, model))
    ]
    names: dict[str, list[str]] = {}
    for _, _, found in rows:
        for name in found.values:
            group = names.setdefault(words.base(name), [])
            if name not in group:
                group.append(name)
    known = [name for name in words.FIGURES if name in names]
    order = [name for name in (*known, *sorted(set(names) - set(known))) if name not in without]
    groups = {base: sorted(names[base], key=lambda name: ("/" in name,)) for base in order}
    wide = apart or sum(len(group) for group in groups.values()) > MOST_COLUMNS
    tables = []
    for chosen in [[base] for base in order] if wide else [order] if order else []:
        columns = [name for base in chosen for name in groups[base]]
        table = Table(
            [
                ("Site", 1),
                ("Model", 1),
                ("Cases", 1),
                *((words.figure_title(base), len(groups[base])) for base in chosen),
            ],
            [],
            ["", "", "", *(name.partition("/")[2] or "all" for name in columns)],
        )
        for alias, model, found in rows:
            own = "own" if model == story.own_model and len(story.models_seen) > 1 else ""
            cells = [(words.figure(name, found.values.get(name)), f"num {own}") for name in columns]
            head = [(alias, "site"), (model, own), (words.count(found.cases), "num")]
            table.rows.append([*head, *cells])
        tables.append(table)
    return tables


def traffic(story: Story) -> Table:
    """Return exact bytes by site, direction and kind, with what TLS and Flower add, and sums."""
    found = {
        (alias, direction): story.kinds(alias, direction) for alias in story.sites for direction in (UP, DOWN)
    }
    seen = {kind for kinds in found.values() for kind in kinds}
    if not seen and not any(site.transport for site in story.sites.values()):
        return Table([], [])
    order = [kind for kind in words.KINDS if kind in seen] + sorted(seen - set(words.KINDS))
    head = ["Site", "Direction", *(words.KINDS.get(kind, kind) for kind in order)]
    table = Table([(name, 1) for name in (*head, "Messages", "TLS and Flower framing", "On the wire")], [])
    for (alias, direction), kinds in found.items():
        ends = (
            story.messages(alias, direction),
            story.framing(alias, direction),
            story.carried(alias, direction),
        )
        cells = [(words.count(value), "num") for value in (*(kinds.get(kind) for kind in order), *ends)]
        table.rows.append([(alias, "site"), (_ARROWS[direction], ""), *cells])
    for direction in (UP, DOWN) if len(story.sites) > 1 else ():
        of = [kinds for (_, way), kinds in found.items() if way == direction]
        sums = [
            sum(kinds.get(kind, 0) for kinds in of) if any(kind in kinds for kinds in of) else None
            for kind in order
        ]
        framing = [story.framing(alias, direction) for alias in story.sites]
        added = None if None in framing else sum(value or 0 for value in framing)
        values = [*sums, story.total(direction, wire=False), added, story.total(direction, wire=True)]
        cells = [(words.count(value), "num") for value in values]
        table.foot.append([("all sites", ""), (_ARROWS[direction], ""), *cells])
    return table


_ARROWS = {UP: "↑ up", DOWN: "↓ down"}
_ROLES = {
    "worker": "the hospital's worker: data, model, training",
    "supernode": "the hospital's connection to the coordinator",
    "relay": "passes messages between connection and worker",
    "superlink": "the coordinator's door for the sites",
    "serverapp": "the coordinator's rounds and aggregation",
    "simulation": "Flower's simulation runtime",
}


def processes(story: Story) -> Table:
    """Return peak memory by process."""
    table = Table([(name, 1) for name in ("Process", "What it is", "Peak memory", "Peak GPU memory")], [])
    for name, item in sorted(story.processes.items(), key=lambda pair: -(pair[1].peak or -1.0)):
        role = next((text for key, text in _ROLES.items() if name.startswith(key)), "")
        if item.peak is not None or item.gpu is not None:
            cells = [(words.memory(item.peak), "num"), (words.memory(item.gpu), "num")]
            table.rows.append([(name, ""), (role, "text"), *cells])
    return table


def gallery(story: Story, folder: Path, kind: str = "slices") -> list[tuple[str, list[Picture], str]]:
    """Return (site, pictures beside this page, sentence) of each site that wrote pictures.

    Args:
        story: What is told.
        folder: The run folder.
        kind: "slices", examples of a segmentation; or "styles", a training sample in other sites' styles.
    """
    found = []
    for alias, site in story.sites.items():
        home = folder / "sites" / alias / kind
        written = site.slices if kind == "slices" else site.styles
        files = (
            sorted(path.name for path in home.iterdir() if path.suffix.lower() in _SUFFIXES)
            if (is_alias(alias) and home.is_dir())
            else []
        )
        if not files and not written:
            continue
        pictures = [
            Picture(quote(f"sites/{alias}/{kind}/{name}"), _caption(Path(name).stem, kind))
            for name in files[:MOST_PICTURES]
        ]
        sentence = (
            "" if files else f"{words.plural(written or 0, 'picture')} lie at the hospital and are not here."
        )
        found.append((alias, pictures, sentence))
    return found


def _caption(stem: str, kind: str) -> str:
    return f"in the style of {stem}" if kind == "styles" else stem.replace("_", " ")


def configuration(story: Story) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the run's configuration by section."""
    top, sections = [], []
    for key, value in story.config.items():
        if isinstance(value, dict):
            sections.append((key, [(name, _plain(item)) for name, item in value.items()]))
        else:
            top.append((key, _plain(value)))
    return ([("run", top)] if top else []) + [section for section in sections if section[1]]


def _plain(value: Any) -> str:
    if isinstance(value, list) and all(not isinstance(item, list | dict) for item in value):
        return ", ".join(str(item) for item in value) or words.NONE
    if value is None or value == "":
        return words.NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
