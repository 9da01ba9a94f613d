"""The report's pictures of masks and of other styles: drawn from what was told, absent where nothing was."""

import json
import random
import re

import pytest
import torch

from common.events import EVENT_SCHEMA
from common.mask_figures import MaskFigures
from ops import plots_masks
from ops.plots import COLOURS
from ops.plots_masks import independent, mask_charts
from ops.report import write_report
from ops.story_masks import masks_of
from ops.story_reader import read_story
from tests.ops.sample_events import START, Sample
from tests.ops.test_report import EVIL, Page

pytestmark = pytest.mark.slow  # draws pages

SITES = ("hospital-1", "hospital-2", "hospital-3")
SHAPES = {
    "encoder.0.conv.weight": 432,
    "encoder.0.conv.bias": 16,
    "decoder.1.conv.weight": 6912,
    "out.weight": 48,
}


def told(seed=0, sites=SITES, shapes=SHAPES, density=0.2):
    drawn = torch.Generator().manual_seed(seed)
    common = {name: torch.rand(size, generator=drawn) for name, size in shapes.items()}
    made = MaskFigures(shapes)
    for place, site in enumerate(sites):
        own = {name: torch.rand(size, generator=drawn) for name, size in shapes.items()}
        share = {name: density * (0.4 + 0.8 * order) for order, name in enumerate(shapes)}
        made.add(
            site,
            {name: torch.minimum(common[name] + 0.3 * place, own[name]) < share[name] / 2 for name in shapes},
        )
    return made.told()


def add(folder, event, *, file="events.jsonl", when=START + 1e5, **fields):
    line = {"v": EVENT_SCHEMA, "t": when, "process": "server", "event": event} | fields
    with (folder / file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def with_masks(folder, rounds=(2, 3), **options):
    for number in rounds:
        add(folder, "method.figures", round=number, method="pfl-resfim", figures=told(number, **options))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return with_masks(Sample(method="fedavg", rounds=3).write(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def charts(run):
    return mask_charts(read_story(run))


def texts(svg):
    return [re.sub(r"<[^>]*>", "", found) for found in re.findall(r"<text.*?</text>", svg, flags=re.DOTALL)]


def test_the_story_holds_the_masks_of_every_round(run):
    masks = read_story(run).masks
    assert sorted(masks) == [2, 3]
    figures = told(3)
    for name in ("sites", "density", "by_tensor", "overlap", "holders", "parameters"):
        assert getattr(masks[3], name) == figures[name]


def test_the_page_shows_density_overlap_holders_and_places(page, charts):
    assert "What stays at the hospitals" in page.text
    assert "Overlap of the sensitive parameters, round 3" in page.text
    densities, overlaps, holders, layers = charts
    figures = told(3)
    shown = texts(layers.svg)
    assert [name for name in SHAPES if any(text.startswith(name) for text in shown)] == list(SHAPES)
    percents = [f"{100 * value:.0f}" for row in figures["by_tensor"] for value in row if value >= 0.0995]
    assert percents
    assert set(percents) <= set(shown)
    pairs = [(0, 1), (0, 2), (1, 2)]
    for row, column in pairs:
        assert texts(overlaps.svg).count(f"{figures['overlap'][row][column]:.2f}") >= 2
        assert (
            f"({figures['chance'][row][column]:.2f}, {figures['chance_by_tensor'][row][column]:.2f})"
            in overlaps.svg
        )
    mean = sum(figures["overlap"][row][column] for row, column in pairs) / 3
    assert f"Mean over 3 pairs: {mean:.2f} (" in overlaps.caption
    assert f"{100 * figures['holders'][0] / figures['parameters']:.1f}" in texts(holders.svg)
    assert densities.sites


def test_colours_come_from_the_page_and_words_on_them_stay_readable(charts):
    for chart in charts:
        assert not re.findall(r"#[0-9a-f]{6}\b", chart.svg)
        assert "var(--" in chart.svg
    layers = charts[-1].svg
    assert "var(--paper)" in layers
    assert "var(--ink)" in layers
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


def test_same_masks_same_bytes_and_a_run_without_has_no_section(run, charts, tmp_path):
    assert mask_charts(read_story(run)) == charts
    bare = Sample(method="fedavg", rounds=2).write(tmp_path / "bare")
    assert mask_charts(read_story(bare)) == []
    text = Page(write_report(bare).read_text(encoding="utf-8")).text
    assert "What stays at the hospitals" not in text
    assert "other hospitals' styles" not in text
    assert "Beside other runs" not in text


def test_a_round_that_is_run_again_shows_its_last_masks(tmp_path):
    folder = Sample(method="fedavg", rounds=3, interrupted=((3, "killed"),)).write(tmp_path / "run")
    lines = (folder / "events.jsonl").read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if '"round.start"' in line and '"round":3' in line]
    for seed, place in ((1, starts[0]), (2, starts[1] + 1)):
        when = json.loads(lines[place])["t"]
        event = {"v": EVENT_SCHEMA, "t": when, "process": "server", "event": "method.figures", "round": 3}
        lines.insert(place + 1, json.dumps(event | {"method": "pfl-resfim", "figures": told(seed)}))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert read_story(folder).masks[3].density == told(2)["density"]


def spoiled():
    for change in (
        {"kind": "other"}, {"sites": []}, {"sites": ["a", "a", "b"]}, {"density": [0.1, 0.2]}, {"density": [0.1, 0.2, 2.0]},
        {"density": [0.1, 0.2, True]}, {"sizes": [1]}, {"by_tensor": [[0.1]]}, {"overlap": [[1.0]]}, {"overlap": None},
        {"chance": [[None] * 3] * 2}, {"holders": [1, 2]}, {"holders": [-1, 0, 0, 1]}, {"parameters": "many"},
        {"tensors": list("abc")}, {"sites": [1, 2, 3]}, {"density": [0.1, 0.2, float("inf")]}, {"density": [0.1, 0.2, None]},
    ):  # fmt: skip
        yield told() | change
    yield from (None, [], "masks", 7)


def test_figures_that_do_not_hold_together_are_left_out():
    assert masks_of(told()) is not None
    assert [figures for figures in spoiled() if masks_of(figures) is not None] == []
    assert masks_of(told() | {"more": "of a later version"}) is not None


@pytest.mark.parametrize("sites", [1, pytest.param(14, marks=pytest.mark.slow)])
def test_any_number_of_hospitals_and_of_tensors_can_be_drawn(tmp_path, sites):
    aliases = tuple(f"a-hospital-with-a-long-name-{place}" for place in range(sites))
    shapes = {f"part.{'very.' * 12}long.{place}.weight": 8 * (place + 1) for place in range(60)}
    folder = Sample(method="fedavg", rounds=1, sites=aliases).write(tmp_path / "run")
    with_masks(folder, rounds=(1,), sites=aliases, shapes=shapes, density=0.1)
    charts = mask_charts(read_story(folder))
    assert all(chart.svg for chart in charts)
    assert "20 smaller tensors left out" in charts[-1].caption
    assert len([text for text in texts(charts[-1].svg) if "long." in text]) == plots_masks.MOST_ROWS
    cells = [text for text in texts(charts[-1].svg) if re.fullmatch(r"(&lt;)?[0-9.]+", text)]
    assert len(cells) == (plots_masks.MOST_ROWS * sites if sites <= plots_masks.MOST_NUMBERED else 0)


def test_empty_masks_and_evil_names_are_drawn_and_escaped(tmp_path):
    folder = Sample(method="fedavg", rounds=1, sites=("a", "b")).write(tmp_path / "run")
    shapes = {EVIL: 3, "w": 5}
    made = MaskFigures(shapes)
    for site in (EVIL, "b"):
        made.add(site, {})
    add(folder, "method.figures", round=1, method="pfl-resfim", figures=made.told())
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert "What stays at the hospitals" in page.text
    assert "<script" not in html


def test_independent_masks_are_those_of_a_thousand_draws():
    density = [0.1, 0.5, 0.9, 0.0]
    found = independent(density)
    drawn = random.Random(0)
    counts = [0] * 5
    for _ in range(20_000):
        counts[sum(drawn.random() < share for share in density)] += 1
    assert sum(found) == pytest.approx(1.0)
    assert found == pytest.approx([count / 20_000 for count in counts], abs=0.015)


def test_pictures_of_styles_are_linked_where_they_lie(tmp_path):
    folder = Sample(method="fedavg", rounds=1).write(tmp_path / "run")
    for alias in SITES[:2]:
        add(folder, "styles.saved", file=f"events-{alias}.jsonl", site=alias, round=1, count=2)
    home = folder / "sites" / SITES[0] / "styles"
    home.mkdir(parents=True)
    for other in SITES[1:]:
        (home / f"{other}.png").write_bytes(b"")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    links = [value for name, value in page.attributes if name == "src"]
    assert [link for link in links if "/styles/" in link] == [
        f"sites/{SITES[0]}/styles/{other}.png" for other in SITES[1:]
    ]
    assert f"in the style of {SITES[1]}" in page.text
    assert "2 pictures lie at the hospital and are not here" in page.text
