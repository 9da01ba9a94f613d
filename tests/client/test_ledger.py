import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import client.ledger as module
from client.ledger import Ledger, Record, read, verify
from common.errors import LedgerError, StorageError
from tests.client.ledgers import SHA, ZERO, Clock, fill, lines, model

ROOT = Path(__file__).resolve().parents[2]


def test_a_line_holds_what_was_said_and_the_chain_is_as_documented(tmp_path):
    path = tmp_path / "home/ledger.jsonl"
    ledger = Ledger(path, Clock())
    assert ledger.head == f"0:{ZERO}"
    head = ledger.append(
        "run-1", 2, "round", "out",
        [model(norm=2.5, cases=11), Record("metrics", "metrics", 5, SHA, decision="refused", reason="policy: no")],
    )  # fmt: skip
    first, second = (json.loads(line) for line in lines(path))
    assert first | {"hash": ""} == {
        "n": 1, "time": "2026-01-01T12:00:01.123Z", "run": "run-1", "round": 2, "phase": "round", "direction": "out",
        "part": "model", "kind": "model", "tensors": 2, "shapes": {"a.weight": [3, 4], "a.bias": [4]}, "bytes": 100,
        "sha256": SHA, "norm": 2.5, "cases": 11, "decision": "released", "reason": "", "prev": ZERO, "hash": "",
    }  # fmt: skip
    assert (second["n"], second["prev"], second["reason"]) == (2, first["hash"], "policy: no")
    for entry in (first, second):
        body = {key: value for key, value in entry.items() if key != "hash"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == entry["hash"]
    assert head == ledger.head == f"2:{second['hash']}"
    assert ledger.count == 2
    assert json.loads(path.with_name("ledger.head").read_bytes()) == {"n": 2, "hash": second["hash"]}
    assert [entry.model_dump(mode="json") for entry in read(path)] == [first, second]
    summary = verify(path, head)  # while the worker holds it
    assert (summary.entries, summary.first_time, summary.head, summary.torn_bytes) == (
        2,
        first["time"],
        head,
        0,
    )


def test_a_message_costs_one_write_and_one_sync_of_the_ledger(tmp_path, monkeypatch):
    path = fill(tmp_path)
    ledger = Ledger(path)
    seen = []
    real_write, real_sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: seen.append(("write", fd)) or real_write(fd, data))
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(("sync", fd)) or real_sync(fd))
    ledger.append("run-1", 4, "round", "out", [model(), model(), model()])
    own = [what for what, fd in seen if fd == ledger._fd]
    assert own == ["write", "sync"]
    count = len(lines(path))
    ledger.append("run-1", 4, "round", "out", [])
    assert len(lines(path)) == count == 12


def test_names_shapes_and_norms_of_the_other_end_are_bounded_and_printable(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    shapes = {f"t{number}": (2,) for number in range(100)}
    hostile = "\x1b[2J\ud800" + "x" * 5000
    ledger.append(
        hostile, 0, "ping", "in",
        [Record(hostile, "model", 1, SHA, shapes=shapes, norm=float("inf"), reason=hostile), 
         Record("ü", "model", 1, SHA, norm=float("nan"))],
    )  # fmt: skip
    ledger.close()
    first, second = read(path)
    assert (first.tensors, len(first.shapes), first.norm, second.norm) == (100, 64, None, None)
    assert all(text.isprintable() for text in (first.run, first.part, first.reason))
    assert len(first.run) <= 128
    assert len(first.reason) <= 1000
    assert second.part == "ü"
    assert path.read_bytes().isascii()
    assert verify(path).entries == 2


@pytest.mark.parametrize(
    ("record", "phase"),
    [
        (Record("model", "model", -1, SHA), "round"),
        (Record("model", "model", 1, "short"), "round"),
        (Record("model", "model", 1, SHA), "lunch"),
        (Record("model", "model", 1, SHA, cases=1.5), "round"),
        (Record("model", "model", 1, SHA, norm=-1.0), "round"),
    ],
)
def test_a_record_that_does_not_fit_writes_nothing(tmp_path, record, phase):
    path = fill(tmp_path)
    before = path.read_bytes()
    ledger = Ledger(path)
    with pytest.raises(LedgerError, match="does not fit the ledger"):
        ledger.append("run-1", 1, phase, "out", [model(), record])
    assert path.read_bytes() == before
    assert ledger.count == 9


# -- who may write, and where ------------------------------------------------------------------------------------------


def test_two_openers_are_one_too_many(tmp_path):
    path = fill(tmp_path)
    ledger = Ledger(path)
    with pytest.raises(LedgerError, match="alpha: another worker writes this ledger"):
        Ledger(path, site="alpha")
    code = f"from pathlib import Path; from client.ledger import Ledger; Ledger(Path({str(path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LedgerError: Another worker writes this ledger" in other.stderr
    link = tmp_path / "other" / "ledger.jsonl"
    link.parent.mkdir()
    link.symlink_to(path)
    (tmp_path / "other/ledger.head").write_bytes(path.with_name("ledger.head").read_bytes())
    with pytest.raises(LedgerError, match="Another worker"):
        Ledger(link)
    for handle in (ledger._fd, ledger._lock_fd):
        assert fcntl.fcntl(handle, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    ledger.append("run-1", 4, "round", "out", [model()])
    ledger.close()
    assert Ledger(path).count == 10
    with pytest.raises(LedgerError, match="closed"):
        ledger.append("run-1", 4, "round", "out", [model()])


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nothing"])
def test_only_a_regular_file_can_be_a_ledger(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target = Path("/dev/null")
    path = tmp_path / "home/ledger.jsonl"
    path.parent.mkdir()
    path.symlink_to(target)
    for call in (Ledger, verify, lambda path: list(read(path))):
        with pytest.raises(LedgerError, match="must be a regular file"):
            call(path)
    assert target.exists() == (kind != "nothing")
    real = fill(tmp_path / "real")
    path.unlink()
    path.symlink_to(real)
    path.with_name("ledger.head").write_bytes(real.with_name("ledger.head").read_bytes())
    assert Ledger(path).count == 9  # a link to a regular file is one


@pytest.mark.parametrize("harm", ["append", "cut", "move", "replace"])
def test_a_file_that_changes_under_the_worker_stops_it(tmp_path, harm):
    path = fill(tmp_path)
    ledger = Ledger(path)
    data = path.read_bytes()
    if harm == "append":
        path.write_bytes(data + b"x")
    elif harm == "cut":
        os.truncate(path, len(data) - 5)
    else:
        path.rename(tmp_path / "moved")
        if harm == "replace":
            path.write_bytes(data)
    with pytest.raises(LedgerError, match=r"another program changed it|moved or replaced"):
        ledger.append("run-1", 4, "round", "out", [model()])
    assert ledger.count == 9


def test_nothing_and_what_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(LedgerError, match="There is no ledger here"):
        verify(path)
    Ledger(path).close()
    summary = verify(path, f"0:{ZERO}")
    assert (summary.entries, summary.first_time, summary.head) == (0, "", f"0:{ZERO}")
    real = os.open

    def refuse(place, *rest, **named):
        if str(place) == str(path):
            raise PermissionError(errno.EACCES, "no", str(path))
        return real(place, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"^The ledger cannot be read \(this user may not"):
        verify(path)
    with pytest.raises(StorageError, match=r"^alpha: the ledger cannot be written"):
        Ledger(path, site="alpha")


# -- counters and threads ----------------------------------------------------------------------------------------------


def test_bytes_are_counted_by_run_round_and_direction_across_a_restart(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append("run-1", 1, "round", "in", [model(5, decision="received")])
    ledger.append("run-1", 2, "round", "in", [model(10, decision="received"), model(99, decision="refused")])
    ledger.append("run-1", 2, "round", "out", [model(20), Record("figures", "figures", 3, SHA)])
    ledger.append("run-2", 0, "ping", "in", [Record("config", "config", 1, SHA, decision="received")])
    for _ in range(2):
        assert ledger.bytes_in("run-1", 2, "in") == 10
        assert ledger.bytes_in("run-1", 2, "out") == 23
        assert ledger.bytes_in("run-1", 1, "out") == ledger.bytes_in("run-9", 2, "in") == 0
        ledger.close()
        ledger = Ledger(path)
    ledger.append("run-1", 2, "round", "out", [model(7)])
    assert ledger.bytes_in("run-1", 2, "out") == 30
    for round_ in range(3, 3 + module.MAX_ROUNDS):
        ledger.append("run-1", round_, "round", "out", [model(1)])
    assert len(ledger._bytes) == module.MAX_ROUNDS
    assert ledger.bytes_in("run-1", 2, "out") == 0


def test_threads_write_one_chain(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)

    def work(number):
        for round_ in range(10):
            ledger.append(f"run-{number}", round_, "round", "out", [model(), model()])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(path, ledger.head).entries == ledger.count == 80
    entries = list(read(path))
    assert all(first.run == second.run for first, second in zip(entries[::2], entries[1::2], strict=True))


def test_the_ledger_does_not_import_torch():
    code = "import sys, client.ledger; print([m for m in ('torch', 'monai', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
