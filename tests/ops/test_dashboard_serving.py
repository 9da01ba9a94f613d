"""The dashboard as a program: what it says before it serves, what it keeps, and whom it lets in."""

import http.client
import json
import shutil
import socket
import time

import pytest
import typer
from typer.testing import CliRunner

from common.errors import ConfigError, ProcessError
from ops import dashboard, dashboard_runs
from ops.dashboard import Names, Server, Site, split_address
from ops.dashboard_cli import dashboard as command
from ops.dashboard_runs import Board
from tests.ops.boards import PLAIN, Clock, served, tell, written


def test_an_empty_folder_says_what_it_waits_for_and_a_lost_one_is_told(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    clock = Clock(1000.0)
    with served(folder, clock) as (browser, _):
        page = browser.ask("/")
        assert "No run yet" in page.text
        assert "wardround trial" in page.text
        assert json.loads(browser.ask("/healthz").text) == {
            "status": "ok",
            "runs": 0,
            "newest_event_age_seconds": None,
        }
        _, last = written(folder / "one", rounds=1)
        clock.now = last + 12.5
        assert json.loads(browser.ask("/healthz").text) == {
            "status": "ok",
            "runs": 1,
            "newest_event_age_seconds": 12.5,
        }
        shutil.rmtree(folder)
        health = browser.ask("/healthz")
        assert (health.status, json.loads(health.text)["status"]) == (503, "the runs folder cannot be read")
        assert "cannot be read any more" in browser.ask("/").text
        assert browser.ask("/runs/one").status == 503


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"no such folder.*RUNS_DIR") as caught:
        Board(tmp_path / "none")
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no such folder"):
        Board(tmp_path / "file")
    run, _ = written(tmp_path / "runs" / "one", rounds=1)
    with pytest.raises(ConfigError, match=r"single run.*folder above"):
        Board(run)
    site = Site(Board(run.parent))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ProcessError, match=rf"Port {taken} on 127.0.0.1 cannot be bound.*another port"):
            Server("127.0.0.1", taken, site, Names())
    with pytest.raises(ProcessError, match="--listen"):
        Server("192.0.2.1", 0, site, Names())  # no interface of this machine
    for text in (
        "8080",
        "127.0.0.1",
        "example.org:80",
        "127.0.0.1:x",
        "127.0.0.1:70000",
        "::1:80",
        "[127.0.0.1]:80",
        "",
    ):
        with pytest.raises(ConfigError, match="ADDRESS:PORT"):
            split_address(text)
    assert split_address("localhost:0") == ("127.0.0.1", 0)
    assert split_address("[::1]:8080") == ("::1", 8080)


def test_the_command_says_what_it_shows(tmp_path):
    app = typer.Typer()
    app.command()(command)
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "140"})
    assert told.exit_code == 0
    for word in ("/runs/NAME", "/metrics", "--listen", "--name", "--silent-after", "no login"):
        assert word in told.output
    wrong = CliRunner().invoke(app, [str(tmp_path), "--listen", "nowhere"])
    assert isinstance(wrong.exception, ConfigError)


def test_reports_are_kept_and_few(tmp_path):
    runs = [written(tmp_path / f"run-{number}", rounds=1)[0] for number in range(10)]
    made = []

    def render(story, folder):
        made.append(folder.name)
        return PLAIN

    _, last = written(tmp_path / "going", rounds=3, verdict="", stop_after=1)
    clock = Clock(last)
    with served(tmp_path, clock, render=render) as (browser, site):
        for _ in range(3):
            assert browser.ask("/runs/going").status == 200
        assert made == ["going"]
        tell(tmp_path / "going", {"event": "checkpoint", "round": 1, "t": last})
        page = browser.ask(
            "/runs/going"
        ).text  # just made: what is new waits for a moment, and the page says so
        assert "The report below is" in page
        assert made == ["going"]
        site.reports._clock = lambda: 1e9
        assert "The report below is" not in browser.ask("/runs/going").text
        assert made == ["going", "going"]
        for run in runs:
            assert browser.ask(f"/runs/{run.name}").status == 200
        assert len(site.reports._kept) == 8
        assert (
            sum(run.told is not None for run in site.board._runs.values()) <= dashboard_runs.MOST_RESTING + 2
        )


def test_those_who_connect_and_say_nothing_take_a_few_places_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "MOST_CONNECTIONS", 2)
    with served(tmp_path, Clock(0.0)) as (browser, _):
        idle = [socket.create_connection(("127.0.0.1", browser.port), timeout=10) for _ in range(2)]
        deadline = time.monotonic() + 10
        while browser_is_answered(browser) and time.monotonic() < deadline:
            time.sleep(0.01)  # until both have their places
        assert not browser_is_answered(browser)
        for one in idle:
            one.close()
        while not browser_is_answered(browser) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert browser_is_answered(browser)


def browser_is_answered(browser):
    try:
        return browser.ask("/healthz").status == 200
    except (OSError, http.client.HTTPException):
        return False
