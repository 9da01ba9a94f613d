"""The study's lab against the harness's own federation, its reading of events and results, and the tables made of them."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from experiments import lab
from experiments.pfl_resfim import study, tables
from tests.harness import Federation, table_config

pytestmark = pytest.mark.slow  # runs federations, draws plots

ALIASES = ("alpha", "beta", "gamma")


def job(method, root, name="one", **settings):
    return lab.Job(name, root, method, rounds=2, seed=7, tags={"task": "tiny"}, **settings)


@pytest.fixture
def federation(tmp_path):
    """Tables of three sites, and the harness's settings as the data root's."""
    made = Federation(tmp_path, ALIASES)
    document = table_config().model_dump(mode="json")
    settings = {section: document[section] for section in ("data", "train", "rounds")}
    (tmp_path / "data" / "federation.json").write_text(json.dumps({"name": "tiny", **settings}))
    return made


@pytest.mark.parametrize("method", ["fedavg", "pfl-resfim"])
def test_a_job_gives_the_figures_of_the_harnesss_run(federation, tmp_path, method):
    settings = {"rho": 0.4, "first": 1} if method == "pfl-resfim" else {}
    found = lab.run_job(
        job(method, tmp_path / "data", settings=tuple(f"{k}={v}" for k, v in settings.items())),
        tmp_path / "out",
    )
    federation.run(table_config(method, rounds=2, **settings), home="harness")
    metrics = [event for event in federation.events("harness") if event["event"] == "metric"]
    kind = "personal" if settings else "global"
    own = [event for event in metrics if event["model"] == kind]
    test = {event["site"]: event for event in own if event["split"] == "test"}
    assert tuple(found["test"]) == ALIASES
    for site, row in found["test"].items():
        assert row.pop("cases") == test[site]["cases"]
        assert row == {name: round(value, 5) for name, value in test[site]["values"].items()}
    for event in own:
        if event["split"] == "validation":
            row = found["validation"][str(event["round"])]
            assert row[event["site"]] == round(event["values"][event["primary"]], 5)
    assert found["primary"] == own[0]["primary"]
    assert max(found["validation"]) == "2"


def test_a_result_says_what_ran_and_nothing_else_stays(federation, tmp_path, monkeypatch):
    one = job("fedprox", tmp_path / "data", settings=("mu=0.5",))
    lab.run_job(
        one, tmp_path / "before"
    )  # the first run of a process lets torch make a cache folder of its own
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(lab.tempfile, "tempdir", str(tmp_path / "temporary"))
    found = lab.run_job(one, tmp_path / "out")
    assert not list((tmp_path / "temporary").iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one.json"]
    assert lab.read_results(tmp_path / "out") == {"one": json.loads(json.dumps(found))}
    assert (found["method"], found["rounds"], found["seed"], found["data"]) == ("fedprox", 2, 7, "tiny")
    assert found["params"]["mu"] == 0.5
    assert found["tags"] == {"task": "tiny"}
    assert found["bytes"]["up"].keys() == found["phases"].keys() == set(ALIASES)
    assert all(sums["train"] > 0 for sums in found["phases"].values())
    assert str(tmp_path) not in (tmp_path / "out" / "one.json").read_text()


class Inside(ThreadPoolExecutor):
    """The pool of `run_jobs` in this process, one job at a time."""

    def __init__(self, workers, **_):
        super().__init__(1)


def test_only_jobs_without_a_result_run_and_a_failure_keeps_the_others(tmp_path, monkeypatch):
    ran, broken = [], {"c"}

    def pretend(one, out):
        ran.append(one.name)
        if one.name in broken:
            raise RuntimeError("no memory")
        found = {
            "name": one.name,
            "method": one.method,
            "seed": one.seed,
            "settings": one.settings,
            "rounds": one.rounds,
            "primary": "auc",
            "test": {"alpha": {"cases": 2, "auc": 0.5}},
            "seconds": 1.0,
        }
        (out / f"{one.name}.json").write_text(json.dumps(found))
        return found

    monkeypatch.setattr(lab, "ProcessPoolExecutor", Inside)
    monkeypatch.setattr(lab, "run_job", pretend)
    pretend(job("fedavg", tmp_path, "a"), tmp_path)
    ran.clear()
    (tmp_path / ".b.part").write_text("{")  # was being written when a study was stopped
    jobs = [job("fedavg", tmp_path, name) for name in "abc"]
    with pytest.raises(RuntimeError, match="no memory"):
        lab.run_jobs(jobs, tmp_path, workers=1)
    assert ran == ["b", "c"]
    broken.clear()
    found = lab.run_jobs(jobs, tmp_path, workers=1)
    assert ran == ["b", "c", "c"]
    assert list(found) == ["a", "b", "c"]
    lab.run_jobs(jobs, tmp_path, workers=1)
    assert ran == ["b", "c", "c"]
    with pytest.raises(ValueError, match="'a' is of other settings"):
        lab.run_jobs([job("ditto", tmp_path, "a")], tmp_path, workers=1)


def test_a_failing_site_ends_the_job(federation, tmp_path):
    (tmp_path / "data" / "beta" / "table.csv").write_text("a,b,c,target,split\n")
    with pytest.raises(Exception, match="beta"):
        lab.run_job(job("fedavg", tmp_path / "data"), tmp_path / "out")
    assert lab.read_results(tmp_path / "out") == {}


def metric(site, model, split, round_, dice, cases=2):
    return {
        "event": "metric", "site": site, "model": model, "split": split, "round": round_, "cases": cases,
        "primary": "dice", "values": {"dice": dice, "loss": 1 - dice},
    }  # fmt: skip


def test_figures_of_a_hand_made_log(tmp_path):
    events = [
        metric("a", "global", "validation", 1, 0.1), metric("a", "personal", "validation", 1, 0.123456),
        metric("b", "global", "validation", 1, 0.3),
        metric("a", "personal", "validation", 10, 0.5), metric("b", "global", "validation", 10, 0.7),
        metric("a", "personal", "validation", 9, 0.9), metric("b", "global", "validation", 9, 0.9),
        metric("a", "global", "test", 10, 0.2), metric("a", "personal", "test", 10, 0.6, cases=1),
        metric("b", "global", "test", 10, 0.8, cases=3),
        {"event": "bytes", "site": "a", "round": 1, "direction": "up", "total": 100},
        {"event": "bytes", "site": "a", "round": 2, "direction": "up", "total": 11},
        {"event": "bytes", "site": "a", "round": 1, "direction": "down", "total": 7},
        {"event": "bytes", "site": "b", "round": 1, "direction": "up", "total": 5},
        {"event": "site.reply", "site": "a", "phases": {"train": 1.5, "save": 0.1}},
        {"event": "site.reply", "site": "a", "phases": {"train": 0.25}},
        {"event": "site.reply", "site": "b", "phases": None},
        {"event": "round.end", "round": 1},
    ]  # fmt: skip
    log = tmp_path / "events.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "met')
    found = lab.figures(log)
    assert found == {
        "primary": "dice",
        "validation": {"1": {"a": 0.12346, "b": 0.3}, "10": {"a": 0.5, "b": 0.7}, "9": {"a": 0.9, "b": 0.9}},
        "test": {"a": {"cases": 1, "dice": 0.6, "loss": 0.4}, "b": {"cases": 3, "dice": 0.8, "loss": 0.2}},
        "bytes": {"up": {"a": 111, "b": 5}, "down": {"a": 7}},
        "phases": {"a": {"train": 1.75, "save": 0.1}, "b": {}},
    }
    assert lab.overall(found) == pytest.approx((0.6 + 3 * 0.8) / 4)
    assert lab.validation(found) == pytest.approx(0.6), "the last round is 10, not 9"
    assert lab.validation(found, 1) == pytest.approx((0.12346 + 0.3) / 2)


def result(name, seed, tags, dice, **changes):
    """Two sites with 1 and 3 test cases; the second's figure is 0.2 higher."""
    return {
        "name": name, "seed": seed, "tags": tags, "primary": "dice", "rounds": 4, "data": "mni152", "params": {"mu": 1},
        "test": {"a": {"cases": 1, "dice": dice}, "b": {"cases": 3, "dice": dice + 0.2}},
        "validation": {str(number): {"a": dice * number / 4, "b": dice * number / 4} for number in range(5)},
        "bytes": {"up": {"a": 4_000_000, "b": 8_000_000}, "down": {"a": 1, "b": 1}}, "seconds": 100.0 + 20 * seed,
        **changes,
    }  # fmt: skip


@pytest.fixture
def three():
    label = {"task": "brain", "method": "FedAvg"}
    base = {"task": "brain", **study.BASE, "rho": "0.4"}
    runs = [result("one", 0, label, 0.5), result("two", 1, label, 0.6), result("three", 0, base, 0.7)]
    return {run["name"]: run for run in runs}


def line(text, start):
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_tables_of_three_hand_made_results(three):
    brain, vessels = (tables.method_table(three, task) for task in ("brain", "vessels"))
    assert line(brain, "| method") == [
        "method", "seeds", "all test cases", "a", "b", "MB up per site and round", "CPU seconds"
    ]  # fmt: skip
    # all test cases: (d + 3 (d + 0.2)) / 4 = d + 0.15; over d = 0.5, 0.6 the standard deviation is 0.1 / sqrt(2)
    assert line(brain, "| FedAvg") == [
        "FedAvg", "2", "0.700 ± 0.071", "0.550 ± 0.071", "0.750 ± 0.071", "1.500 ± 0.000", "110 ± 14"
    ]  # fmt: skip
    assert line(brain, "| Ditto") == ["Ditto", "0", "-", "-", "-", "-", "-"]
    assert {line(vessels, f"| {label} ")[1] for label in study.METHODS} == {"0"}
    swept = tables.sweep_table(three)
    assert line(swept, "| rho | 0.4") == ["rho", "0.4", "1", "0.700", "1.500", "0", "-", "-"]
    assert line(swept, "| rho | 0.2 (base)")[2:4] == ["0", "-"]
    # beside the sweep stand methods with its seeds alone
    assert line(swept, "| FedAvg")[2:4] == ["1", "0.500"]
    assert line(swept, "| local only")[2:4] == ["0", "-"]


def test_the_lines_beside_the_sweep_are_of_the_same_round(three):
    longer = {str(number): {"a": 0.1 * number, "b": 0.1 * number} for number in range(7)}
    three["one"] |= {"rounds": 6, "validation": longer}
    three["two"] |= {"rounds": 6, "validation": longer}
    assert tables.references(three, "brain")["FedAvg"] == [pytest.approx(0.4)]
    del longer["4"]
    assert tables.references(three, "brain")["FedAvg"] == []


@pytest.mark.parametrize(
    "change", [{"rounds": 5}, {"params": {"mu": 2}}, {"seed": 0}, {"data": "other"}], ids=str
)
def test_results_of_two_studies_are_not_averaged(three, change):
    three["two"] |= change
    with pytest.raises(ValueError, match="results of 'FedAvg, brain'"):
        tables.method_table(three, "brain")


def test_files_of_three_hand_made_results(three, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    # all five take a second to draw
    monkeypatch.setattr(tables, "SWEEP", {name: study.SWEEP[name] for name in ("rho", "residual")})
    for name, run in three.items():
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps(run))
    tables.main(["--results", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert text.count("| FedAvg |") == 3
    for name in ("sweep", "sites", "curves"):
        with Image.open(tmp_path / "out" / f"{name}.png") as drawn:
            assert drawn.width > 300
            assert len(drawn.convert("RGB").getcolors(1 << 24)) > 5, "an empty sheet has one colour"
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path / "nothing")])
