"""The report's pictures of the network between hospitals: drawn from what was told, absent where nothing was."""

import json
import math
import re
from itertools import combinations

import pytest
import torch

from common.events import EVENT_SCHEMA
from common.method import Groups, Reply, RoundContext
from common.methods.pfednet import PFEDNET, PFedNetServer
from common.payload import Kind, Payload
from ops import plots_network
from ops.plots_network import network_charts
from ops.report import write_report
from ops.story import Network
from ops.story_network import MOST_EDGES, network_of
from ops.story_reader import read_story
from tests.ops.sample_events import START, Sample
from tests.ops.test_report import EVIL, Page

SITES = ("hospital-1", "hospital-2", "hospital-3", "hospital-4")
EDGES = [["hospital-1", "hospital-2"], ["hospital-2", "hospital-4"]]
HEADING = "Who is drawn together"


def told(edges=EDGES, **changed):
    return {
        "edges": edges, "lam": 0.25, "distance_before": 2.0, "distance_after": 1.5, "iterations": 7, "converged": True,
    } | changed  # fmt: skip


def with_network(folder, *rounds):
    with (folder / "events.jsonl").open("a", encoding="utf-8") as lines:
        for number, figures in rounds:
            line = {
                "v": EVENT_SCHEMA,
                "t": START + 1e5,
                "process": "server",
                "event": "method.figures",
                "round": number,
            }
            lines.write(json.dumps(line | {"method": "pfednet", "figures": figures}) + "\n")
    return folder


def story_of(folder, *rounds, sites=SITES, count=3, **sample):
    sample = Sample(method="fedavg", rounds=count, sites=sites, **sample)
    return read_story(with_network(sample.write(folder), *rounds))


def drawn_page(folder):
    return write_report(folder).read_text(encoding="utf-8")


def texts(svg):
    return [re.sub(r"<[^>]*>", "", found) for found in re.findall(r"<text.*?</text>", svg, flags=re.DOTALL)]


def strokes(svg, name):
    """How many lines of a colour are drawn: what a path, and not a marker, is stroked with."""
    return len(re.findall(rf'<path d="[^"]*" clip-path[^>]*style="[^"]*stroke: var\(--{name}\)', svg))


def test_a_real_round_of_the_method_is_what_is_read():
    server = PFedNetServer(PFEDNET.parse({"personal": ["all"], "lam": 1, "network": "complete"}))
    model, ctx = {"w": torch.zeros(3)}, RoundContext("run", 1, 3, 7)
    state = server.init(model, Groups({"extractor": ["w"], "head": []}), ctx)
    acc = server.begin(state, ctx)
    for place, site in enumerate("abc"):
        payload = Payload("model", Kind.MODEL, {"w": torch.tensor([float(place), 0.0, 0.0])})
        acc = server.fold(acc, Reply(site, 10, {"model": payload}))
    found = network_of(json.loads(json.dumps(server.figures(server.finish(state, acc, ctx), acc, ctx))))
    assert found.edges == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (found.count, found.converged) == (3, True)
    assert found.before == pytest.approx(4 / 3)  # sites at 0, 1 and 2
    assert found.after == pytest.approx(0, abs=1e-4)  # a relative λ of 1 makes them one
    assert found.lam > 0


def test_edges_are_pairs_or_where_there_are_many_a_count():
    expected = Network([tuple(edge) for edge in EDGES], 2, 0.25, 2.0, 1.5, 7, True)
    assert network_of(told()) == expected
    assert network_of(told() | {"kind": "similarity-network", "more": "of a later version"}) == expected
    assert network_of(told(300)) == Network(None, 300, 0.25, 2.0, 1.5, 7, True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_figure_that_is_no_number_is_none_and_the_rest_stays(bad):
    found = network_of(told(lam=bad, distance_after=bad))
    assert (found.lam, found.before, found.after) == (None, 2.0, None)
    assert found.edges == [tuple(edge) for edge in EDGES]


@pytest.mark.parametrize("nobody", [[], 0])
def test_where_nobody_is_joined_there_is_no_distance_and_no_strength(nobody):
    found = network_of(told(nobody, lam=0.0, distance_before=0.0, distance_after=0.0))
    assert (found.count, found.lam, found.before, found.after) == (0, None, None, None)


def spoiled():
    for change in (
        {"kind": "sensitivity-masks"}, {"edges": None}, {"edges": -1}, {"edges": True}, {"edges": 1.5}, {"edges": "a:b"},
        {"edges": [["a"]]}, {"edges": [["a", "b", "c"]]}, {"edges": [["a", ""]]}, {"edges": [["a", 1]]}, {"edges": {"a": "b"}},
        {"edges": [["a", "a"]]}, {"edges": [["a", "b"], ["b", "a"]]}, {"edges": [["a", str(n)] for n in range(MOST_EDGES + 1)]},
        {"lam": -0.1}, {"lam": "much"}, {"lam": True}, {"lam": 1e300}, {"lam": 10**400}, {"distance_before": [1.0]},
        {"distance_after": -1.0}, {"iterations": -1}, {"iterations": 2.5}, {"iterations": None}, {"converged": None},
        {"converged": "yes"}, {"converged": 1},
    ):  # fmt: skip
        yield told() | change
    for name in told():
        yield {key: value for key, value in told().items() if key != name}
    yield from (None, [], "network", 7, {}, {"edges": []})


def test_figures_that_do_not_hold_together_are_left_out():
    assert [figures for figures in spoiled() if network_of(figures) is not None] == []


def test_the_story_holds_the_network_of_every_round_and_its_last_run(tmp_path):
    story = story_of(
        tmp_path / "run", (2, told()), (3, told(lam=0.5)), (3, told(9)), (3, {"edges": 1}), (0, told())
    )
    assert sorted(story.networks) == [2, 3]
    assert story.networks[2].edges == [tuple(edge) for edge in EDGES]
    assert story.networks[3].count == 9
    assert story.masks == {}


@pytest.mark.slow
def test_lines_join_those_that_were_joined_in_the_last_round_that_told_them(tmp_path):
    absent = {(2, "hospital-3"): ("worker", "It did not answer.")}
    rounds = (1, told([["hospital-1", "hospital-3"]])), (2, told()), (3, told(400))
    chart = network_charts(story_of(tmp_path / "run", *rounds, absent=absent))[0]
    assert chart.title.endswith("round 2")
    assert ": 2 of 3 pairs." in chart.caption
    assert chart.description.endswith("hospital-1 and hospital-2; hospital-2 and hospital-4")
    assert texts(chart.svg) == list(SITES)
    assert strokes(chart.svg, "k1") == 2
    assert [key.label for key in chart.legend] == ["pale: took no part in this round"]
    assert not re.findall(r"#[0-9a-f]{6}\b", chart.svg)


@pytest.mark.slow
def test_distances_have_gaps_and_rounds_without_convergence_a_mark(tmp_path):
    rounds = [(number, told(converged=number not in {2, 4}, iterations=100 * number)) for number in (1, 2, 4)]
    rounds[0][1]["distance_before"] = math.nan
    chart = network_charts(story_of(tmp_path / "run", *rounds, count=4))[1]
    labels = [key.label for key in chart.legend]
    assert labels == [
        "as sent", "after the fusion step", "✕ the solver did not converge: rounds 2, 4 (up to 400 iterations)"
    ]  # fmt: skip
    assert "λ used" in texts(chart.svg)
    assert strokes(chart.svg, "miss") == 2
    assert "nan" not in chart.svg.lower()
    calm = network_charts(story_of(tmp_path / "calm", (1, told()), (2, told())))[1]
    assert [key.label for key in calm.legend] == labels[:2]
    assert "var(--miss)" not in calm.svg


@pytest.mark.slow
def test_only_so_many_are_drawn_and_the_rest_is_counted(tmp_path):
    sites = tuple(f"a-hospital-with-a-long-name-{place}" for place in range(40))
    edges = [list(pair) for pair in combinations(sites, 2)]
    chart = network_charts(story_of(tmp_path / "run", (1, told(edges)), sites=sites, count=1))[0]
    assert len(texts(chart.svg)) == plots_network.MOST_SITES
    assert strokes(chart.svg, "k1") == plots_network.MOST_LINES
    assert f": {len(edges)} of 780 pairs; 8 hospitals and {len(edges) - 200} lines left out." in chart.caption


@pytest.mark.slow
def test_the_section_is_there_for_runs_that_have_a_network_and_nothing_hostile_gets_through(tmp_path):
    plain = Sample(method="fedavg", rounds=1).write(tmp_path / "plain")
    assert network_charts(read_story(plain)) == []
    assert HEADING not in Page(drawn_page(plain)).text
    figures = told([[EVIL, "hospital-1"], ["hospital-2", "$x^2$\n]]>\x00"]])
    evil = with_network(Sample(method="fedavg", rounds=1).write(tmp_path / "evil"), (1, figures))
    html = drawn_page(evil)
    page = Page(html)
    assert HEADING in page.text
    assert "<script" not in html
    assert "script" not in page.tags
    assert drawn_page(evil) == html


@pytest.mark.slow
@pytest.mark.parametrize("edges", [250, 0, []])
def test_a_network_without_lines_is_told_in_words(tmp_path, edges):
    folder = with_network(Sample(method="fedavg", rounds=1).write(tmp_path / "run"), (1, told(edges)))
    text = Page(drawn_page(folder)).text
    assert HEADING in text
    if edges == 250:
        assert "250 pairs were joined in round 1, too many to be told one by one." in text
    else:
        assert "No distance was told: nobody was joined." in text
        assert ("0 of 3 pairs." in text) == (edges == [])
