import json

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, DataError
from common.federation import Federation, write_federation
from ops.preflight_site import check_cases, check_data
from ops.site_cli import site_app
from tests.datafiles import PATIENT, describe, segmentation_site, table_site


def run(*arguments):
    return CliRunner().invoke(site_app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def strings(value):
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_clean_site_is_ready(tmp_path):
    segmentation_site(tmp_path / "alpha", cases=3)
    done = run("check", tmp_path / "alpha", "--json", tmp_path / "out/check.json")
    assert done.exit_code == 0, done.output
    assert "ready: 1 site(s), 0 error(s)" in done.output
    for shown in ("training", "1.5 x 2 x 3", "10 x 11 x 12", "LPS", "tumour", "T1"):
        assert shown in done.output
    document = json.loads((tmp_path / "out/check.json").read_text())
    assert [site["site"] for site in document["sites"]] == ["alpha"]
    assert document["sites"][0]["ok"] is True
    assert [case["case"] for case in document["sites"][0]["cases"]] == ["case-0001", "case-0002", "case-0003"]
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out/check.json"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ""])
def test_errors_exit_with_three_and_identifiers_stay_at_the_terminal(tmp_path, suffix):
    folder = segmentation_site(tmp_path / "alpha", cases=3, suffix=suffix)
    broken = folder / f"imagesTr/{PATIENT}_1{suffix}"
    for path in broken.iterdir() if broken.is_dir() else [broken]:
        path.write_bytes(b"nothing")
    done = run("check", folder, "--json", tmp_path / "check.json")
    assert done.exit_code == DataError.exit_code == 3
    assert "not ready" in done.output
    assert "case-0002: the image" in done.output
    assert f"(here: {broken}" in done.output  # the hospital's own terminal may say where
    said = strings(json.loads((tmp_path / "check.json").read_text()))
    assert not [text for text in said if PATIENT in text or "/" in text]


def test_every_site_under_a_folder_is_checked(tmp_path):
    segmentation_site(tmp_path / "beta", cases=3)
    segmentation_site(tmp_path / "alpha", cases=3)
    describe(tmp_path / "gamma", trainings=[])
    done = run("check", tmp_path, "--json", tmp_path / "check.json")
    assert done.exit_code == 3
    assert "3 site(s), 1 error(s)" in done.output
    assert [site["ok"] for site in json.loads((tmp_path / "check.json").read_text())["sites"]] == [
        True,
        True,
        False,
    ]
    assert run("check", tmp_path, "--site", "beta").exit_code == 0
    assert isinstance(run("check", tmp_path, "--site", "delta").exception, DataError)


def test_alias_replaces_the_folders_name(tmp_path):
    folder = segmentation_site(tmp_path / "ward7", cases=3)
    done = run("check", folder, "--site", "alpha", "--json", tmp_path / "check.json")
    assert "ward7" not in done.output
    assert json.loads((tmp_path / "check.json").read_text())["sites"][0]["site"] == "alpha"


def test_folder_name_that_is_no_alias_asks_for_one(tmp_path):
    folder = segmentation_site(tmp_path / "Doe, Jane", cases=3)
    assert "--site" in str(run("check", folder).exception)
    assert "Doe" not in str(run("check", folder).exception)
    assert run("check", folder, "--site", "alpha").exit_code == 0


def test_against_a_run(tmp_path):
    folder = segmentation_site(tmp_path / "alpha", cases=3)
    labels = ["background", "tumour", "core"]
    write_federation(tmp_path, Federation("x", settings={"data": {"labels": labels, "channels": ["T1"]}}))
    assert run("check", folder, "--against", tmp_path / "federation.json").exit_code == 0
    write_federation(tmp_path, Federation("x", settings={"data": {"labels": labels, "channels": ["T2"]}}))
    done = run("check", folder, "--against", tmp_path / "federation.json")
    assert done.exit_code == 3
    assert "channels: expected (T2), got (T1)" in done.output
    (tmp_path / "federation.json").write_text('{"data": {"chanels": []}}')
    assert isinstance(run("check", folder, "--against", tmp_path / "federation.json").exception, ConfigError)


def test_table(tmp_path):
    folder = table_site(tmp_path / "alpha", ["50,200,0,training", "60,,1,training", "70,3,1,test"])
    done = run("check", folder)
    assert done.exit_code == 0, done.output
    assert "33.3 %" in done.output
    assert "tabular" in done.output


def test_many_problems_of_a_kind_are_cut_at_the_terminal_alone(tmp_path):
    rows = [f"{i % 7},1,0,training" for i in range(60)]
    done = run("check", table_site(tmp_path / "alpha", rows), "--json", tmp_path / "check.json")
    assert "and 33 more of warning duplicate" in done.output
    problems = json.loads((tmp_path / "check.json").read_text())["sites"][0]["problems"]
    assert sum(problem["code"] == "duplicate" for problem in problems) == 53


def test_folder_that_is_not_there_or_holds_nothing(tmp_path):
    for folder in (tmp_path / PATIENT, tmp_path):
        done = run("check", folder)
        assert isinstance(done.exception, DataError)
        assert str(folder) not in str(done.exception)
        assert str(folder) in done.exception.detail


def test_help_teaches_by_example():
    done = run("check", "--help")
    assert done.exit_code == 0
    assert "wardround site check /data/liver" in done.output
    assert "wardround site check oak" in done.output
    assert "dataset.json" in done.output


def test_preflight_reads_every_case_when_asked(tmp_path, monkeypatch):
    folder = segmentation_site(tmp_path / "alpha", cases=3)
    assert check_cases(folder, "alpha", "x").mark in ("ok", "warn")
    next((folder / "imagesTr").iterdir()).write_bytes(b"nothing")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert check_data(folder, "alpha").mark == "ok"
    broken = check_cases(folder, "alpha", "x")
    assert broken.exit_code == DataError.exit_code
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    left = check_cases(folder, "alpha", "docker run ... /srv/patients")
    assert "/srv" not in left.found + left.remedy
    assert "docker run ..." in left.detail
