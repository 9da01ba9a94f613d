"""The dashboard over real HTTP: what is shown, what is never answered, and what a broken run costs."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket

import pytest

from ops import dashboard_runs
from ops.dashboard_pages import render_safely
from tests.ops.boards import Clock, served, settled, tell, written
from tests.ops.sample_events import Sample
from tests.ops.test_report import EVIL, Page

SECRET = "a-secret-that-never-leaves"
LATE = 500.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a finished, a failed, a silent and a running run, and the time at which they are that."""
    folder = tmp_path_factory.mktemp("all") / "runs"
    folder.mkdir()
    gone = ("worker", "hospital-2: the worker is not there; start it at the hospital.")
    absent = {(2, "hospital-2"): gone, (3, "hospital-2"): gone}
    written(folder / "done", rounds=2)
    written(folder / "lost", rounds=5, verdict="failed", stop_after=3, absent=absent)
    written(folder / "quiet", rounds=5, verdict="", stop_after=2)
    _, last = written(folder / "going", rounds=6, verdict="", stop_after=4, absent={(4, "hospital-3"): gone})
    now = last + LATE
    tell(folder / "going", {"event": "checkpoint", "round": 4, "t": now - 5})
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "events.jsonl").write_text(SECRET)
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text(SECRET)
    return folder, now


@pytest.fixture(scope="module")
def site(runs):
    with served(runs[0], Clock(runs[1]), names=["dash.example.org"], silent_after=300.0) as (browser, _):
        yield browser


def tree(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def test_all_runs_stand_on_one_page_with_their_states(site):
    page = site.ask("/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    text = Page(page.text).text
    assert re.findall(r'href="/runs/([^"]+)"', page.text).__len__() == 4
    assert "1 running 1 silent 1 failed 1 finished" in text
    assert "silent for 8 min" in text
    assert "quorum Round 3: 1 sites contributed, 3 are needed." in text
    assert "hospital-2 missing (worker): the worker is not there; start it at the hospital." in text
    assert "4 of 6" in text
    assert page.text.count('<svg class="spark"') == 4
    rows = site.rows()
    assert {name: row["state"] for name, row in rows.items()} == {
        "done": "ok", "lost": "failed", "quiet": "silent", "going": "running",
    }  # fmt: skip
    states = {one["alias"]: (one["state"], one["up"], one["failures"]) for one in rows["going"]["sites"]}
    assert states == {
        "hospital-1": ("takes part", True, 0), "hospital-2": ("takes part", True, 0), "hospital-3": ("missing", False, 1),
    }  # fmt: skip


def test_pages_need_nothing_but_themselves_and_their_policy_says_so(site):
    page = site.ask("/")
    parsed = Page(page.text)
    assert "script" not in parsed.tags
    assert not [1 for name, _ in parsed.attributes if name.startswith("on") or name in {"style", "src"}]
    assert all(value.startswith(("/", "?")) for name, value in parsed.attributes if name == "href")
    digest = hashlib.sha256(re.search(r"<style>(.*?)</style>", page.text, re.S)[1].encode()).digest()
    policy = page.headers["Content-Security-Policy"]
    assert f"style-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    for target in ("/", "/runs/going", "/api/runs.json", "/metrics", "/healthz", "/nothing"):
        headers = site.ask(target).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src ")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"
        assert "Python" not in headers["Server"]


def test_a_page_asks_again_by_itself_until_it_is_held_or_the_run_is_over(site):
    assert 'http-equiv="refresh" content="10"' in site.ask("/").text
    assert "http-equiv" not in site.ask("/?refresh=0").text
    assert 'http-equiv="refresh" content="30"' in site.ask("/runs/going").text
    assert "http-equiv" not in site.ask("/runs/going?refresh=0").text
    assert "http-equiv" not in site.ask("/runs/done").text


def test_a_runs_page_begins_with_what_is_wrong_and_what_to_do(site):
    lost = Page(site.ask("/runs/lost").text).text
    assert lost.index("Round 3: 1 sites contributed, 3 are needed.") < lost.index("the report")
    assert "wardround resume runs/lost continues after round 2." in lost
    assert (
        "hospital-2 (worker) the worker is not there; start it at the hospital. Missing for 2 rounds in a row."
        in lost
    )
    assert "What to do: Look at the site's worker log; start its worker again." in lost
    assert re.search(r"since 2025-10-09 \d\d:\d\d:\d\d UTC, \d+ min", lost)
    quiet = Page(site.ask("/runs/quiet").text).text
    assert "No event for 8 min" in quiet
    assert "wardround resume runs/quiet continues after round 2" in quiet
    done = Page(site.ask("/runs/done").text).text
    assert "The run ended well." in done


def test_head_is_a_get_without_its_body_and_nothing_else_is_served(site, runs):
    before = tree(runs[0])
    for target in ("/healthz", "/runs/done", "/nothing"):
        get, head = site.ask(target), site.ask(target, "HEAD")
        assert (head.status, head.body) == (get.status, b"")
        assert head.headers["Content-Type"] == get.headers["Content-Type"]
        assert head.headers["Content-Length"] == str(len(get.body))
    with socket.create_connection(
        ("127.0.0.1", site.port), timeout=10
    ) as calling:  # an ordinary client would not see a body
        calling.sendall(b"HEAD /runs/done HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b"".join(iter(lambda: calling.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.0 200 ")
    assert answer.endswith(b"\r\n\r\n")
    assert b"<" not in answer
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW"):
        page = site.ask("/runs/done", method, body=b"x" * 3000)
        assert (page.status, page.headers["Allow"]) == (405, "GET, HEAD")
        assert "expected GET or HEAD" in page.text
    assert tree(runs[0]) == before


@pytest.mark.parametrize(
    "target",
    [
        "/runs/../outside", "/runs/../../outside/events.jsonl", "/runs/..%2foutside", "/runs/%2e%2e/outside", "/runs/..",
        "/runs/.", "/runs/", "/runs/done/", "/runs/done/events.jsonl", "/runs/done/../going", "/runs//done", "/../../etc/passwd",
        "/runs/outside", "/runs/empty", "/runs/file.txt", "/file.txt", "/runs/done%00", "/runs/d\\one", "/templates/dashboard.css",
        "/runs/" + "a" * 5000, "/runs/<script>", "/RUNS/done", "//runs/../x", "http://[/", "/api/runs.json/..", "/healthz/",
    ],
)  # fmt: skip
def test_no_path_is_made_of_what_was_asked_for(site, target):
    page = site.ask(target)
    assert page.status in (400, 404)
    assert page.headers["Content-Type"].startswith("text/plain")
    assert SECRET not in page.text
    assert "<" not in page.text
    assert "outside" not in page.text


def test_a_name_that_was_made_to_point_here_gets_nothing(site):
    for host in (
        "evil.example", f"evil.example:{site.port}", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil",
        "localhost:80:80", "localhost:x", "[::1", "[evil]", "127.0.0.1 evil", "dash.example.org.evil",
    ):  # fmt: skip
        page = site.ask("/", host=host)
        assert (page.status, "<" in page.text) == (421, False), host
    for host in ([], ["localhost", "localhost"], ["localhost", "evil.example"]):
        assert site.ask("/", host=host).status == 400
    for host in (
        "localhost", f"LOCALHOST:{site.port}", "127.0.0.1", "[::1]:8080", "192.0.2.7:80", "dash.example.org", "Dash.Example.Org.:443",
    ):  # fmt: skip
        assert site.ask("/healthz", host=host).status == 200, host


def test_what_is_no_request_is_refused_without_an_echo(site):
    for raw in (
        b"<script>\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"\x00\xff\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as calling:
            calling.sendall(raw)
            answer = b""
            try:
                while part := calling.recv(65536):
                    answer += part
            except ConnectionResetError:
                pass
        assert b"<script" not in answer
        assert (
            b"HTTP/1.0 4" in answer
            or b"HTTP/1.0 505" in answer
            or answer == b"This request cannot be answered.\n"
        )


def test_links_out_of_the_folder_and_odd_files_are_not_opened(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    outside, last = written(tmp_path / "outside", rounds=1)
    _, last = written(folder / "plain", rounds=1)
    (folder / "linked").symlink_to(outside)
    for name, make in {
        "inner": lambda path: path.symlink_to(outside / "events.jsonl"), "pipe": os.mkfifo, "folder": lambda path: path.mkdir(),
    }.items():  # fmt: skip
        (folder / name).mkdir()
        make(folder / name / "events.jsonl")
    (folder / "conf").mkdir()
    (folder / "conf" / "config.json").symlink_to(outside / "config.json")
    shutil.copytree(outside, folder / "<b>run")
    with served(folder, Clock(last)) as (browser, _):
        rows = browser.rows()
        assert set(rows) == {"plain", "inner", "pipe", "folder", "conf"}
        odd = {name: row["problem"] for name, row in rows.items() if row["state"] == "unread"}
        assert set(odd) == {"inner", "pipe", "folder", "conf"}
        assert all("no regular file" in why for why in odd.values())
        page = browser.ask("/").text
        assert "2 folders are left out" in page
        assert "<b>run" not in page
        assert browser.ask("/runs/linked").status == 404
        assert (browser.ask("/runs/pipe").status, browser.ask("/runs/plain").status) == (503, 200)


def test_a_growing_run_is_followed_line_by_line(tmp_path):
    folder, last = written(tmp_path / "going", rounds=9, verdict="", stop_after=1)
    clock = Clock(last)
    with served(tmp_path, clock) as (browser, _):
        assert browser.rows()["going"]["round"] == 1
        with (folder / "events.jsonl").open("a") as file:
            file.write('{"v":1,"process":"server","t":%f,"event":"round.start","round":2,"si' % (last + 1))
        assert browser.rows()["going"]["round"] == 1
        with (folder / "events.jsonl").open("a") as file:
            file.write('tes":["hospital-1"]}\n')
        assert browser.rows()["going"]["round"] == 2
        tell(folder, {"event": "site.asked", "site": "hospital-1", "round": 2, "t": last + 2})
        clock.now = last + 2
        row = browser.rows()["going"]
        assert row["sites"][0]["state"] == "waited for"
        assert row["sites"][1]["state"] == "not asked"
        assert row["unreadable_lines"] == 0
        events = row["events"]
        for path in folder.glob("events*.jsonl"):  # begun anew under the same name
            path.unlink()
        Sample(rounds=9, verdict="", stop_after=1).write(folder)
        settled(folder)
        again = browser.rows()["going"]
        assert (again["round"], again["events"]) == (1, events - 2)


def test_a_broken_events_file_costs_its_lines_and_no_other_run(tmp_path):
    written(tmp_path / "fine", rounds=1)
    folder, last = written(tmp_path / "broken", rounds=2, verdict="", stop_after=1)
    with (folder / "events.jsonl").open("ab") as file:
        file.write(
            b"\x00\xff\xfe\n{}\n[1]\n"
            + b"[" * 100_000
            + b"\n"
            + b'{"v":1,"event":"round.end","round":"x","t":[]}\n'
        )
    settled_at = last
    os.utime(folder / "events.jsonl", (settled_at, settled_at))
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "config.json").write_text("{{{")
    with served(tmp_path, Clock(last)) as (browser, _):
        rows = browser.rows()
        assert (rows["broken"]["unreadable_lines"], rows["broken"]["round"]) == (4, 1)
        assert rows["fine"]["state"] == "ok"
        assert rows["noise"]["round"] is None
        assert "4 lines of the event files could not be read" in browser.ask("/runs/broken").text
        assert [browser.ask(path).status for path in ("/", "/metrics", "/runs/noise")] == [200, 200, 200]


def test_a_run_that_cannot_be_told_hides_no_other(tmp_path, monkeypatch, capfd):
    written(tmp_path / "fine", rounds=1)
    _, last = written(tmp_path / "bad", rounds=1)
    real = dashboard_runs.summary

    def summary(name, *rest):
        if name == "bad":
            raise KeyError(SECRET)
        return real(name, *rest)

    monkeypatch.setattr(dashboard_runs, "summary", summary)
    with served(tmp_path, Clock(last)) as (browser, site):
        assert {name: row["state"] for name, row in browser.rows().items()} == {"fine": "ok", "bad": "unread"}
        assert browser.ask("/runs/bad").status == 503
        monkeypatch.setattr(site.reports, "page", lambda *_, **__: 1 / 0)
        page = browser.ask("/runs/fine")
        assert (page.status, "cannot be made" in page.text) == (500, True)
    told = capfd.readouterr().err
    assert "KeyError" in told
    assert "ZeroDivisionError" in told
    assert SECRET not in told


def test_hostile_text_stays_text_on_every_page(tmp_path):
    folder, last = written(tmp_path / "run", rounds=1, verdict="", stop_after=1)
    evil = [
        {"event": "run.start", "method": EVIL, "task": EVIL, "rounds": 1},
        {"event": "trial.phase", "phase": EVIL},
        {"event": "round.start", "round": 1, "sites": [EVIL, "hospital-1"]},
        {"event": "site.asked", "site": EVIL, "round": 1},
        {"event": "site.failed", "site": EVIL, "round": 1, "code": EVIL, "message": EVIL},
        {"event": "site.refused", "site": EVIL + "2", "code": EVIL, "message": EVIL},
        {"event": "process.start", "name": EVIL}, {"event": "process.exit", "name": EVIL, "code": 1},
        {"event": "process.restart", "name": EVIL + "3", "why": EVIL, "attempt": EVIL},
        {"event": "warning", "code": EVIL, "message": EVIL, "site": EVIL},
        {"event": "metric", "site": EVIL, "round": 0, "split": "validation", "model": EVIL, "values": {EVIL: 0.5}, "primary": EVIL},
        {"event": "run.end", "verdict": "failed", "code": EVIL, "message": EVIL},
    ]  # fmt: skip
    tell(folder, *({**event, "t": last} for event in evil))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "command": "wardround trial --data /srv/names", "data_name": EVIL})
    )
    (folder / "sites" / "hospital-1" / "slices").mkdir(parents=True)
    (folder / "sites" / "hospital-1" / "slices" / "miller-anna.png").write_bytes(b"")
    with served(tmp_path, Clock(last), render=render_safely) as (browser, _):
        for target in ("/", "/runs/run"):
            page = browser.ask(target)
            assert page.status == 200
            parsed = Page(page.text)
            assert "script" not in parsed.tags
            assert EVIL in parsed.text
        assert "/srv/names" not in parsed.text  # the report, without the typed command line
        assert "miller" not in page.text  # and without the names of the hospitals' pictures
        assert "The pictures are not shown here." in parsed.text
        assert parsed.text.index("Now") < parsed.text.index("Round by round")
        assert any(one["alias"] == EVIL for one in browser.rows()["run"]["sites"])
