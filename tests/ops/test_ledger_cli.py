import inspect
import json

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger, Record, verify
from common.errors import LedgerError
from ops.ledger_cli import ledger_app
from tests.client.ledgers import SHA, Clock, lines


def run(*arguments, columns="240"):
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner.__init__).parameters else {}
    return CliRunner(**apart).invoke(
        ledger_app, [str(argument) for argument in arguments], env={"COLUMNS": columns}
    )


def squeezed(text):
    return " ".join(text.split())


def fill(home):
    """Two runs: three rounds with a model each way, a refusal, a bracketed name that must not become markup."""
    path = home / "ledger.jsonl"
    ledger = Ledger(path, Clock())
    ledger.append("run-1", 0, "hello", "in", [Record("config", "config", 700, SHA, decision="received")])
    ledger.append("run-1", 0, "hello", "out", [Record("summary", "summary", 300, SHA, cases=11)])
    for round_ in (1, 2, 3):
        ledger.append(
            "run-1", round_, "round", "in", [Record("model", "model", 2_000_000, SHA, decision="received")]
        )
        ledger.append(
            "run-1", round_, "round", "out",
            [Record("update", "model", 1_000_000, SHA, tensors=2, shapes={"w": (3,)}, norm=12.3456, cases=11),
             Record("metrics", "metrics", 40, SHA)],
        )  # fmt: skip
    reason = "policy: alpha: the site's policy lets no payload of kind 'cluster' out."
    ledger.append(
        "run-2", 1, "round", "out", [Record("[red]x", "cluster", 8, SHA, decision="refused", reason=reason)]
    )
    ledger.close()
    return path


@pytest.fixture
def ledger(tmp_path):
    return fill(tmp_path / "alpha")


@pytest.mark.parametrize("where", ["file", "home"])
def test_verify_says_what_is_whole(ledger, where):
    summary = verify(ledger)
    done = run("verify", ledger if where == "file" else ledger.parent, "--head", summary.head)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    for shown in (
        "whole",
        str(ledger),
        "12 entries",
        summary.first_time,
        summary.last_time,
        summary.head,
        "given head fits",
    ):
        assert shown in done.stdout
    assert done.stderr == ""


def test_verify_takes_a_whole_trial_and_names_every_one_that_is_not_whole(tmp_path):
    homes = {name: fill(tmp_path / "run/sites" / name) for name in ("alpha", "beta", "gamma")}
    fill(tmp_path / "elsewhere")
    (tmp_path / "run/sites/delta").mkdir()  # its worker never started
    done = run("verify", tmp_path / "run")
    assert (done.exit_code, done.stdout.count("12 entries")) == (0, 3), done.output
    rows = lines(homes["beta"])
    homes["beta"].write_bytes(b"".join([*rows[:4], *rows[5:]]))
    homes["gamma"].unlink()  # its head file still tells
    done = run("verify", tmp_path / "run", tmp_path / "elsewhere")
    assert done.exit_code == LedgerError.exit_code == 14
    assert done.stdout.count("12 entries") == 2
    wrong = done.stderr.strip().splitlines()
    assert len(wrong) == 2
    assert str(homes["beta"]) in wrong[0]
    assert "Line 5 of the ledger is out of order or lines before it were removed" in wrong[0]
    assert str(homes["gamma"]) in wrong[1]
    assert "cut short: its head file says 12 entries, it has 0" in wrong[1]


def test_verify_with_a_head_from_outside(tmp_path, ledger):
    other = fill(tmp_path / "other")
    third = json.loads(lines(ledger)[2])["hash"]
    assert run("verify", ledger, "--head", f"3:{third}").exit_code == 0
    done = run("verify", ledger, "--head", f"4:{third}")
    assert done.exit_code == 14
    assert "Line 4 of the ledger was changed" in done.stderr
    done = run("verify", ledger, "--head", "4:abc")
    assert done.exit_code == 14
    assert "N:HASH" in done.stderr
    done = run("verify", ledger, other, "--head", f"3:{third}")
    assert done.exit_code == 2
    assert "one ledger; 2 were given" in done.stderr


def test_verify_takes_this_folder_and_names_a_torn_line(ledger, monkeypatch):
    monkeypatch.chdir(ledger.parent)
    with ledger.open("ab") as file:
        file.write(b"half")
    done = run("verify")
    assert done.exit_code == 0, done.output
    assert "12 entries, and 4 bytes of a line that is not whole" in done.stdout


@pytest.mark.parametrize("command", ["verify", "show"])
@pytest.mark.parametrize("place", [".", "ledger.jsonl", "nowhere"])
def test_where_no_ledger_is_the_error_says_what_to_give(tmp_path, command, place):
    done = run(command, tmp_path / place)
    assert isinstance(done.exception, LedgerError)
    assert "There is no ledger here. Give a ledger.jsonl" in str(done.exception)
    assert str(tmp_path) not in str(done.exception)


def test_show_tells_in_words_what_left_what_came_and_what_was_refused(ledger):
    done = run("show", ledger)
    assert done.exit_code == 0, done.output
    left, rest = done.stdout.split("What came in")
    came, rest = rest.split("What was refused")
    refused, table = rest.split("Entries 1 to 12")
    left, came, refused = squeezed(left), squeezed(came), squeezed(refused)
    assert (
        "run run-1: model (weights of the shared network), 3 times, 3 MB, 2026-01-01 12:00:04 to 2026-01-01 12:00:08"
        in left
    )
    assert "metrics (figures of the evaluation), 3 times, 120 B" in left
    assert "summary (counts and ranges of the data set), once, 300 B, 2026-01-01 12:00:02" in left
    assert "cluster" not in left
    assert "model (weights of the shared network), 3 times, 6 MB" in came
    assert "config (settings of the run), once" in came
    assert "run run-2: cluster (which group of similar sites was chosen), once, 8 B" in refused
    assert (
        "it did not leave. policy: alpha: the site's policy lets no payload of kind 'cluster' out." in refused
    )
    for shown in (
        "hello",
        "left",
        "came",
        "model 'update'",
        "12.35",
        "11",
        SHA[:12],
        "1 MB",
        "cluster '[red]x'",
    ):
        assert shown in table
    assert SHA[:13] not in table
    assert "whole: every line was proved" in table


def test_the_table_fits_a_small_terminal(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, Clock())
    record = Record(
        "model",
        "model",
        1_234_567,
        SHA,
        norm=12345.678,
        cases=1234,
        decision="refused",
        reason="policy: too few cases.",
    )
    ledger.append("20260101-120000-fedavg", 12, "closing", "out", [record])
    ledger.close()
    table = run("show", path, columns="80").stdout.split("Entries 1 to 1")[1]
    for shown in (
        "2026-01-01",
        "12:00:01",
        "round 12",
        "refused",
        "stayed",
        "1.23 MB",
        "1.235e+04",
        "1234",
        SHA[:12],
    ):
        assert shown in table
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "…" not in table


def test_show_chooses(ledger):
    def chosen(*options):
        done = run("show", ledger, "--json", *options)
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    everything = chosen("--last", "0")
    stored = [json.loads(line) for line in lines(ledger)]
    assert everything == [{"ledger": "alpha", **entry} for entry in stored]
    assert chosen() == everything
    assert [entry["n"] for entry in chosen("--last", "2")] == [11, 12]
    assert [entry["n"] for entry in chosen("--run", "run-2")] == [12]
    assert [entry["n"] for entry in chosen("--round", "2")] == [6, 7, 8]
    assert [entry["n"] for entry in chosen("--round", "2", "--direction", "in")] == [6]
    assert [entry["n"] for entry in chosen("--direction", "out", "--last", "3")] == [10, 11, 12]
    assert chosen("--run", "run-9") == []
    words = run("show", ledger, "--run", "run-1", "--direction", "out", "--last", "1").stdout
    assert "3 times, 3 MB" in squeezed(words)  # the words count what was chosen, not what is listed
    assert "Entries 11 to 11" in words
    assert "run-2" not in words


def test_show_of_a_changed_ledger_stops_before_the_wrong_line(ledger):
    rows = lines(ledger)
    rows[6] = rows[6].replace(b'"bytes":1000000', b'"bytes":1')
    ledger.write_bytes(b"".join(rows))
    done = run("show", ledger, "--direction", "out")
    assert done.exit_code == 14
    assert "Line 7 of the ledger was changed" in done.stderr
    assert str(ledger) in done.stderr
    assert "every line was proved" not in done.output
    assert "once, 1 MB" in squeezed(done.stdout)
    done = run("show", ledger, "--json", "--last", "0")
    assert done.exit_code == 14
    assert [json.loads(line)["n"] for line in done.stdout.splitlines()] == [1, 2, 3, 4, 5, 6]


def test_show_tells_of_a_repair_and_of_an_empty_ledger(tmp_path, ledger):
    with ledger.open("ab") as file:
        file.write(b"half")
    Ledger(ledger).close()
    words = squeezed(run("show", ledger, "--last", "1").stdout)
    assert "The record was repaired once after a crash" in words
    assert "a torn line of 4 bytes was cut off" in words
    Ledger(tmp_path / "empty/ledger.jsonl").close()
    done = run("show", tmp_path / "empty")
    assert done.exit_code == 0
    assert done.stdout.count("  nothing") == 3


def test_help_teaches():
    whole = squeezed(run("--help").output)
    for shown in ("verify", "show", "--direction out", "hash of the line before"):
        assert shown in whole
    assert "Exit code: 0 all whole, 14" in squeezed(run("verify", "--help").output)
    assert "SHA-256" in run("show", "--help").output
    assert run("show", "x", "--direction", "up").exit_code == 2
