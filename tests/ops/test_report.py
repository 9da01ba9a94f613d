import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from common.errors import ConfigError
from common.events import EVENT_SCHEMA
from ops import words
from ops.plots import COLOURS, site_colour, site_mark, traffic
from ops.report import render, write_report
from ops.report_cli import report, watch
from ops.report_faults import participation
from ops.report_view import cards, result_tables
from ops.report_view import traffic as traffic_table
from ops.story import Story
from ops.story_events import add
from ops.story_reader import read_story
from ops.tables import print_closing
from tests.ops.sample_events import START, Sample

EVIL = "<script>alert('x')</script>$\\frac{1}$&\"'{{7*7}}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    lost = {
        (2, "hospital-2"): ("deadline", "hospital-2: did not answer within the round's deadline of 60 s.")
    }
    return Sample(rounds=3, absent=lost).write(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text(encoding="utf-8")


def closing(folder, width=120):
    console = Console(width=width, file=io.StringIO(), record=True)
    print_closing(folder, console)
    return console.export_text()


def test_the_page_says_what_the_run_was(run, html):
    story, page = read_story(run), Page(html)
    for said in (
        "Brain tissue in three simulated hospitals", "completed", "ditto (lam = 0.1", "Please read with the figures.",
        "hospital-2: did not answer within the round's deadline of 60 s.", words.advice("deadline"),
        "wardround trial --method ditto --rounds 3 --seed 0", "closing evaluation", "On test cases, after round 3.",
        "TLS and Flower framing", "worker-hospital-3", "personal-hospital-1.safetensors", "2.13.0",
    ):  # fmt: skip
        assert said in page.text, said
    for alias in story.sites:
        for model in ("global", "personal"):
            figures = story.final(alias, model).values
            for name in ("dice", "iou", "hd95", "dice/CSF", "hd95/white matter"):
                assert words.figure(name, figures[name]) in page.text
    assert f">{words.count(story.total('up', wire=True))}<" in html
    assert page.tags.count("svg") == 5  # with the strip: a site was missing


def test_the_page_needs_nothing_but_itself(html):
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", html))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses
    assert not [
        value for name, value in page.attributes if name.startswith("on") or "javascript:" in (value or "")
    ]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {value[1:] for name, value in page.attributes if name in {"xlink:href", "href"}}
    referred |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert referred <= set(ids)
    assert not {pair[0] for pair in COLOURS.values()} & set(
        re.findall(r"#[0-9a-f]{6}", "".join(re.findall(r"<svg.*?</svg>", html, re.S)))
    )


def test_same_events_same_bytes(run, html, tmp_path):
    copy = shutil.copytree(run, tmp_path / run.name)
    (copy / "report.html").unlink()
    path = write_report(copy)
    assert path == copy / "report.html"
    assert path.read_text(encoding="utf-8") == html
    assert [file.name for file in copy.iterdir() if file.name.startswith(".")] == []


def test_a_page_that_cannot_be_put_in_its_place_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("ops.report.charts", lambda story: [])  # what is on the page is not the point
    run = Sample(rounds=1).write(tmp_path / "run")
    (run / "report.html").mkdir()
    (run / "report.html" / "kept").write_text("")
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        write_report(run)
    assert str(tmp_path) not in str(caught.value)
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_a_site_has_one_colour_everywhere(run, html):
    story = read_story(run)
    assert len({site_colour(story, alias) for alias in story.sites}) == 3
    for alias in story.sites:
        dots = set(re.findall(rf'<i class="dot [a-z]*" style="--c:var\(--(s\d)\)"></i>{alias}<', html))
        assert dots == {site_colour(story, alias)}


def test_hostile_text_stays_text(tmp_path):
    run = Sample(rounds=1).write(tmp_path / "run")
    for folder in (tmp_path / "outside" / "slices", run / "sites"):
        folder.mkdir(parents=True)
    (tmp_path / "outside" / "slices" / "private.png").write_bytes(b"")
    lines = [
        {"event": "site.failed", "site": "hospital-1", "round": 1, "code": EVIL, "message": EVIL},
        {"event": "site.refused", "site": EVIL, "code": EVIL, "message": EVIL},
        {"event": "warning", "site": EVIL, "code": EVIL, "message": EVIL},
        {"event": "metric", "site": EVIL, "round": 1, "split": "test", "model": EVIL, "values": {EVIL: 0.5}, "primary": EVIL},
        {"event": "metric", "site": EVIL, "round": 1, "split": "validation", "model": EVIL, "values": {EVIL: 0.5}, "primary": EVIL},
        {"event": "site.reply", "site": EVIL, "round": 1, "local": 99.0, "phases": {EVIL: 99.0}, "loss": 0.4},
        {"event": "bytes", "site": EVIL, "round": 1, "direction": "up", "kinds": {EVIL: 10**7}},
        {"event": "model.saved", "name": EVIL, "bytes": 3},
        {"event": "slices.saved", "site": "../../outside", "count": 3},
        {"event": "memory", "name": EVIL, "peak": 3.0},
        {"event": "site.retry", "site": EVIL, "round": 1, "code": EVIL, "message": EVIL, "attempt": 1},
        {"event": "site.late", "site": EVIL, "round": 1, "seconds": EVIL},
        {"event": "site.joined", "site": EVIL, "round": 1, "cases": EVIL},
        {"event": "process.restart", "name": EVIL, "site": EVIL, "why": EVIL, "attempt": EVIL},
        {"event": "checkpoint.refused", "round": 1, "code": EVIL, "message": EVIL},
        {"event": "run.end", "verdict": "failed", "code": EVIL, "message": EVIL},
        {"event": "trial.end", "verdict": "failed", "code": EVIL, "message": EVIL},
    ]  # fmt: skip
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"v": EVENT_SCHEMA, "t": START, **line}) + "\n" for line in lines)
    config = json.loads((run / "config.json").read_text())
    config |= {"title": EVIL, "note": EVIL, "command": EVIL, "software": {EVIL: EVIL}}
    config["config"][EVIL] = {EVIL: [EVIL]}
    (run / "config.json").write_text(json.dumps(config))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 12
    assert "private" not in page.text
    assert EVIL in closing(run, width=4000)


def test_what_was_not_measured_is_a_dash_not_a_zero(tmp_path):
    story = read_story(Sample(rounds=2, runtime="stock", method="fedavg").write(tmp_path / "stock"))
    table = traffic_table(story)
    titles = [title for title, _ in table.head]
    for row in (*table.rows, *table.foot):
        cells = {title: text for title, (text, _) in zip(titles, row, strict=True)}
        assert (cells["TLS and Flower framing"], cells["On the wire"]) == (words.NONE, words.NONE)
        assert cells["Messages"] != words.NONE
    by_title = {card.title: card for card in cards(story)}
    assert "the wire was not measured" in by_title["Bytes moved"].note
    assert "Gain of the personal model" not in by_title

    empty = Story()
    assert {card.value for card in cards(empty)} == {words.NOT_MEASURED}
    assert not result_tables(empty)
    assert "no verdict" in Page(render(empty, tmp_path)).text


def test_a_run_cut_in_its_second_round_still_has_a_page(tmp_path):
    run = Sample(rounds=5, stop_after=2, verdict="").write(tmp_path / "run")
    events = run / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-1500])
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "no verdict" in text
    assert "1 of 5" in text
    assert "On validation cases, after round" in text or "On validation cases, of the initial model" in text
    assert "No verdict yet" in closing(run)


def test_many_sites_and_classes_stay_readable(tmp_path):
    sites = tuple(f"site-{number:02d}" for number in range(9))
    story = read_story(Sample(rounds=1, sites=sites).write(tmp_path / "run"))
    values = {f"{base}/organ {index}": 0.5 for base in ("dice", "iou") for index in range(12)}
    test = {"split": "test", "model": "global", "values": values, "primary": "dice"}
    add(story, {"event": "metric", "site": sites[0], "round": 1, **test})
    assert [table.head[-1][0] for table in result_tables(story)] == ["Dice", "IoU", "HD95", "Loss"]
    assert len({site_mark(story, alias) for alias in sites}) == 9
    assert len(participation(story).rows) == 2
    assert traffic(story).svg.startswith("<svg")


def test_slices_are_linked_and_never_inside(tmp_path):
    run = Sample(rounds=1, verdict="ok").write(tmp_path / "run")
    folder = run / "sites" / "hospital-1" / "slices"
    folder.mkdir(parents=True)
    (folder / 'case-0001 "z".png').write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert [value for name, value in page.attributes if name == "src"] == [
        "sites/hospital-1/slices/case-0001%20%22z%22.png"
    ]
    assert "These pictures stay at the hospital." in page.text
    assert page.text.count("4 pictures lie at the hospital and are not here.") == 2
    assert "data:image" not in html


def test_closing_tables_end_with_the_verdict_and_what_to_do(tmp_path, run):
    good = closing(run)
    assert "Completed: 3 rounds with 3 sites" in good
    assert f"Report: {run / 'report.html'}" in good.replace("\n", "")
    assert "deadline" in good
    assert "Final figures on test cases, after round 3" in closing(run, width=200)
    assert "Final HD95 on test cases" in closing(run, width=90)

    absent = {(2, alias): ("transport", f"{alias}: gone.") for alias in ("hospital-1", "hospital-3")}
    bad = closing(Sample(rounds=4, absent=absent, verdict="failed", stop_after=2).write(tmp_path / "bad"))
    assert "Failed (quorum): Round 2: 1 sites contributed, 3 are needed." in bad
    assert "What to do: " + words.advice("quorum")[:40] in bad
    last = bad.rstrip().splitlines()[-1]
    assert last == f"Then continue: wardround resume {tmp_path / 'bad'} (continues after round 1)"

    early = tmp_path / "early"
    early.mkdir()
    ended = {
        "v": 1,
        "t": START,
        "event": "trial.end",
        "verdict": "failed",
        "code": "config",
        "message": "No such key.",
    }
    (early / "events-trial.jsonl").write_text(json.dumps(ended) + "\n")
    said = closing(early).strip().splitlines()
    assert said[0] == "Failed (config): No such key."


def cli(*arguments):
    app = typer.Typer()
    app.command("report")(report)
    app.command("watch")(watch)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"})


def test_commands_rebuild_and_show(tmp_path, run):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "report.html").unlink()
    done = cli("report", copy)
    assert done.exit_code == 0, done.output
    assert done.output.replace("\n", "").endswith("report.html")
    assert (copy / "report.html").is_file()
    seen = cli("watch", copy)
    assert seen.exit_code == 0
    assert "round 3/3 in" in seen.output
    assert "Completed: 3 rounds" in seen.output

    failed = Sample(rounds=2, verdict="failed", stop_after=1).write(tmp_path / "failed")
    assert cli("watch", failed).exit_code == 1
    cut = Sample(rounds=2, verdict="", stop_after=1).write(tmp_path / "cut")
    assert cli("watch", cut, "--once").exit_code == 0
    for command in ("report", "watch"):
        assert isinstance(cli(command, tmp_path / "nothing").exception, ConfigError)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1412364, "1.41 MB"), (123456, "123 kB"), (38.8e9, "38.8 GB")],
)
def test_sizes_in_words(value, text):
    assert words.size(value) == text


SPANS = {
    None: "–", 0.004: "0.00 s", 9.996: "10.0 s", 59.96: "1 min 00 s", 98.4: "1 min 38 s", 3599.6: "1 h 00 min",
    11100: "3 h 05 min",
}  # fmt: skip


@pytest.mark.parametrize(("value", "text"), SPANS.items())
def test_times_in_words(value, text):
    assert words.duration(value) == text
