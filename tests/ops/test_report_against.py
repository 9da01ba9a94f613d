"""Runs side by side: figures and differences by hospital, and runs that cannot be compared refused by what differs."""

import json
import re
import shutil

import pytest

from common.errors import ConfigError
from ops.report_against import MOST, beside, labels, read_others
from ops.story_reader import read_story
from tests.ops.sample_events import Sample
from tests.ops.test_report import Page, cli


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        name: Sample(method=method, rounds=2, seed=seed).write(root / name)
        for name, method, seed in (("ours", "ditto", 0), ("average", "fedavg", 0), ("again", "fedavg", 1))
    }


def changed(runs, tmp_path, *, config=None, events=lambda text: text):
    """Return a copy of a run with another configuration or other events."""
    folder = tmp_path / "changed"
    shutil.copytree(runs["average"], folder)
    if config is not None:
        document = json.loads((folder / "config.json").read_text())
        config(document)
        (folder / "config.json").write_text(json.dumps(document))
    for path in folder.glob("events*.jsonl"):
        path.write_text(events(path.read_text()))
    return folder


def test_figures_are_those_of_the_runs_and_differences_are_theirs(runs):
    story = read_story(runs["ours"])
    others = read_others([runs["average"], runs["again"]], story)
    found = beside(story, others)
    personal = story.finals("personal")
    average = others[0].finals("global")
    assert [title for title, _ in found.table.head] == [
        "Site", "ditto", "fedavg, seed 0", "difference", "fedavg, seed 1", "difference",
    ]  # fmt: skip
    for row, alias in zip(found.table.rows, story.sites, strict=True):
        texts = [text.replace("\N{MINUS SIGN}", "-") for text, _ in row]
        assert texts[0] == alias
        assert float(texts[1]) == pytest.approx(personal[alias], abs=5e-4)
        assert float(texts[2]) == pytest.approx(average[alias], abs=5e-4)
        assert float(texts[3]) == pytest.approx(average[alias] - personal[alias], abs=5e-4)
        best = max((personal[alias], 1), (average[alias], 2), (others[1].finals("global")[alias], 4))[1]
        assert [place for place, (_, kind) in enumerate(row) if "own" in kind] == [best]
    mean = found.table.foot[0][1][0]
    assert float(mean) == pytest.approx(sum(personal.values()) / 3, abs=5e-4)
    assert "ditto personal model" in found.place
    shown = re.findall(r">(\d\.\d{3})<", found.chart.svg)
    assert sorted(shown) == sorted(text for row in found.table.rows for text, _ in (row[1], row[2], row[4]))


def test_a_hospital_without_figures_has_a_dash_and_is_left_out_of_the_mean(runs, tmp_path):
    alias = "hospital-2"

    def without(text):
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if not ('"metric"' in line and f'"{alias}"' in line))

    story = read_story(runs["ours"])
    found = beside(story, read_others([changed(runs, tmp_path, events=without)], story))
    row = next(row for row in found.table.rows if row[0][0] == alias)
    assert [text for text, _ in row[2:]] == ["\N{EN DASH}"] * 2
    assert found.table.foot[0][0][0] == "mean of the 2 with all figures"


def spoil(key, value):
    return lambda document: document["config"]["data"].update({key: value})


REFUSED = {
    "the spacing of the data differ": {"config": spoil("spacing", [1.0, 1.0, 1.0])},
    "the labels of the data differ": {"config": spoil("labels", ["background", "other"])},
    "its data is 'ixi', this run's 'mni152'": {"events": lambda text: text.replace('"mni152"', '"ixi"')},
    "hospital-3 only in this run; hospital-9 only in it": {
        "config": lambda document: document["config"].update(
            sites=["hospital-1", "hospital-2", "hospital-9"]
        ),
        "events": lambda text: text.replace("hospital-3", "hospital-9"),
    },
    "its main figure is iou, this run's dice": {
        "events": lambda text: text.replace('"primary":"dice"', '"primary":"iou"')
    },
    "it tells no figures": {"events": lambda text: text.replace('"metric"', '"other"')},
    "its figures are of validation cases, this run's of test cases": {
        "events": lambda text: text.replace('"split":"test"', '"split":"other"')
    },
    "hospital-1 was measured on 7 cases there and on 2 here": {
        "events": lambda text: re.sub(r'("split":"test",[^{}]*"cases":)2', r"\g<1>7", text)
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_runs_over_other_hospitals_data_or_figures_are_refused_by_name(runs, tmp_path, why):
    story = read_story(runs["ours"])
    other = changed(runs, tmp_path, **REFUSED[why])
    with pytest.raises(ConfigError) as caught:
        read_others([runs["again"], other], story)
    assert why in str(caught.value)
    assert "The 2nd run of --against (fedavg) cannot stand beside this one" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_too_many_runs_and_a_folder_without_a_run_are_refused(runs, tmp_path):
    story = read_story(runs["ours"])
    with pytest.raises(ConfigError, match=f"at most {MOST}"):
        read_others([runs["average"]] * (MOST + 1), story)
    with pytest.raises(ConfigError, match="holds no run"):
        read_others([tmp_path], story)
    assert beside(story, []) is None


def test_runs_of_one_method_are_told_apart(runs):
    stories = [read_story(runs[name]) for name in ("average", "again", "average")]
    assert labels(stories[:1]) == ["fedavg"]
    assert labels(stories[:2]) == ["fedavg, seed 0", "fedavg, seed 1"]
    assert len(set(labels(stories))) == 3


def test_the_command_writes_the_page_with_them(runs):
    result = cli("report", runs["ours"], "--against", runs["average"])
    assert result.exit_code == 0, result.output
    page = Page((runs["ours"] / "report.html").read_text(encoding="utf-8"))
    assert "Beside other runs" in page.text
