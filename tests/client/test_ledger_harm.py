import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from client.ledger import Ledger, Record, read, verify
from common.errors import LedgerError, StorageError
from tests.client.ledgers import SHA, ZERO, Clock, fill, forged, full_disk, lines, model

# -- what verify must find ---------------------------------------------------------------------------------------------

texts = st.text(max_size=12)
records = st.builds(
    Record,
    part=texts,
    kind=st.sampled_from(["model", "metrics", "control"]),
    bytes=st.integers(0, 2**40),
    sha256=st.binary(max_size=4).map(lambda data: hashlib.sha256(data).hexdigest()),
    tensors=st.integers(0, 99),
    shapes=st.dictionaries(texts, st.lists(st.integers(0, 512), max_size=3), max_size=3),
    norm=st.none() | st.floats(min_value=0),
    cases=st.none() | st.integers(0, 1000),
    decision=st.sampled_from(["released", "received", "refused"]),
    reason=texts,
)
messages = st.lists(
    st.tuples(
        texts,
        st.integers(0, 5),
        st.sampled_from(["hello", "round", "closing", "ping"]),
        st.sampled_from(["in", "out"]),
        st.lists(records, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def written(folder, calls):
    path = Path(folder) / "ledger.jsonl"
    ledger = Ledger(path, Clock())
    for run, round_, phase, direction, parts in calls:
        ledger.append(run, round_, phase, direction, parts)
    ledger.close()
    return path


@quick
@given(messages, st.data())
def test_any_harm_to_a_ledger_is_found(calls, data):
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, calls)
        count = sum(len(call[-1]) for call in calls)
        assert verify(path).entries == count == len(list(read(path)))
        good = path.read_bytes()
        rows = lines(path)
        way = data.draw(st.sampled_from(["byte", "remove", "swap", "double", "cut", "insert", "head"]))
        target = path
        if way in ("byte", "head"):
            target = path if way == "byte" else path.with_name("ledger.head")
            good = target.read_bytes()
            place = data.draw(st.integers(0, len(good) - 1))
            bad = bytearray(good)
            bad[place] = data.draw(st.integers(0, 255).filter(lambda value: value != good[place]))
            bad = bytes(bad)
        elif way == "cut":
            bad = good[: data.draw(st.integers(0, len(good) - 1))]
        else:
            first, second = (data.draw(st.integers(0, count - 1)) for _ in range(2))
            if way == "remove":
                del rows[first]
            elif way == "swap":
                assume(first != second)
                rows[first], rows[second] = rows[second], rows[first]
            else:
                rows.insert(first, rows[second] if way == "double" else forged(rows[second], bytes=2**41))
            bad = b"".join(rows)
        target.write_bytes(bad)
        with pytest.raises(LedgerError):
            verify(path)
        with pytest.raises(LedgerError):
            Ledger(path)
        target.write_bytes(good)
        assert verify(path).entries == count


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda rows: [*rows[:2], rows[2].replace(b'"bytes":9', b'"bytes":8'), *rows[3:]],
            "line 3 .* was changed",
        ),
        (lambda rows: [*rows[:2], rows[2].replace(b'"n":3', b'"n": 3'), *rows[3:]], "line 3 .* was changed"),
        (lambda rows: [*rows[:2], b'"n":3,\n', *rows[3:]], "line 3 .* is not a ledger line"),
        (lambda rows: [*rows[:2], b"[" * 100_000 + b"\n", *rows[3:]], "line 3 .* is not a ledger line"),
        (lambda rows: [*rows[:2], b"x" * (1 << 20) + b"\n", *rows[3:]], "line 3 .* is not a ledger line"),
        (lambda rows: [*rows[:2], b"\n", *rows[3:]], "line 3 .* is not a ledger line"),
        (lambda rows: rows[1:], "line 1 .* out of order or .* removed: it carries the number 2"),
        (
            lambda rows: [*rows[:3], *rows[4:]],
            "line 4 .* out of order or .* removed: it carries the number 5",
        ),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "line 1 .* out of order"),
        (lambda rows: [*rows[:4], rows[3], *rows[4:]], "line 5 .* out of order"),
        (
            lambda rows: [*rows[:2], forged(rows[2], bytes=8), *rows[3:]],
            "line 4 .* a line before it was changed",
        ),
        (
            lambda rows: [*rows[:8], forged(rows[8], bytes=8)],
            "line 9 .* was changed, or .* its head file gives",
        ),
        (lambda rows: rows[:8], "cut short: its head file says 9 entries, it has 8"),
        (lambda rows: [], "cut short: its head file says 9 entries, it has 0"),
        (lambda rows: [*rows[:8], rows[8][:-1]], "cut short: its head file says 9 entries, it has 8"),
        (
            lambda rows: [*rows[:2], forged(rows[2], part="\x1b[2J"), *rows[3:]],
            "line 3 .* is not a ledger line",
        ),
    ],
)
def test_the_first_wrong_line_is_named_with_what_is_wrong(tmp_path, harm, said):
    path = fill(tmp_path)
    path.write_bytes(b"".join(harm(lines(path))))
    with pytest.raises(LedgerError, match=f"(?i)^(the ledger is )?{said}") as found:
        verify(path)
    with pytest.raises(LedgerError, match=f"(?i)^alpha: (the ledger is )?{said}") as opened:
        Ledger(path, site="alpha")
    for error in (found.value, opened.value):
        assert str(tmp_path) not in str(error)
        assert error.detail == str(path)


def test_a_ledger_without_its_head_file_or_without_its_lines_is_refused(tmp_path):
    path = fill(tmp_path)
    head = path.with_name("ledger.head")
    kept = head.read_bytes()
    head.unlink()
    for call in (verify, Ledger):
        with pytest.raises(LedgerError, match="head file is missing"):
            call(path)
    for wrong in (
        b"",
        b"{}",
        b"[]\n",
        b"x",
        kept[:-1],
        kept.replace(b":9", b": 9"),
        b'{"hash":"%s","n":true}\n' % SHA.encode(),
    ):
        head.write_bytes(wrong)
        for call in (verify, Ledger):
            with pytest.raises(LedgerError, match="head file was changed"):
                call(path)
    head.write_bytes(kept)
    path.unlink()
    for call in (verify, Ledger):
        with pytest.raises(LedgerError, match="cut short: its head file says 9 entries, it has 0"):
            call(path)
    assert not path.exists()


def test_a_head_noted_elsewhere_convicts_a_ledger_written_anew(tmp_path):
    path = fill(tmp_path)
    middle = json.loads(lines(path)[4])["hash"]
    last = verify(path).head
    assert verify(path, f"5:{middle}").entries == 9
    for file in list(tmp_path.iterdir()):
        file.unlink()
    ledger = Ledger(path, Clock())
    for round_ in range(1, 4):
        ledger.append("run-1", round_, "round", "in", [model(decision="received"), model(), model()])
    ledger.close()
    assert verify(path).entries == 9  # nothing inside it tells
    with pytest.raises(LedgerError, match=r"Line 5 of the ledger was changed.*noted elsewhere"):
        verify(path, f"5:{middle}")
    with pytest.raises(LedgerError, match="Line 9 "):
        verify(path, last)
    with pytest.raises(LedgerError, match="noted elsewhere says 12 entries, it has 9"):
        verify(path, f"12:{middle}")
    for wrong in ("5", "5:abc", f"-1:{middle}", f"0:{middle}", f"5:{ZERO}", f"5:{middle.upper()}"):
        with pytest.raises(LedgerError, match="N:HASH"):
            verify(path, wrong)


# -- crashes and full disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 37, -1])
def test_a_torn_last_line_is_cut_off_and_the_next_entry_says_so(tmp_path, keep):
    path = fill(tmp_path)
    whole = path.read_bytes()
    torn = forged(lines(path)[-1], n=10)[:keep]
    path.write_bytes(whole + torn)
    summary = verify(path)
    assert (summary.entries, summary.torn_bytes) == (9, len(torn))
    assert path.read_bytes() == whole + torn  # verify only reads
    assert len(list(read(path))) == 9
    ledger = Ledger(path, site="alpha")
    entry = list(read(path))[-1]
    assert (entry.n, entry.part, entry.direction, entry.decision) == (10, "recovered", "in", "received")
    assert entry.reason.startswith(f"a torn line of {len(torn)} bytes was cut off")
    assert (entry.bytes, entry.sha256) == (len(torn), hashlib.sha256(torn).hexdigest())
    assert ledger.bytes_in("run-1", 3, "in") == 100  # the torn bytes are nobody's
    ledger.close()
    assert Ledger(path).count == verify(path).entries == 10


def test_a_recovery_that_finds_no_space_keeps_the_torn_line_for_the_next_one(tmp_path, monkeypatch):
    path = fill(tmp_path)
    path.write_bytes(path.read_bytes() + b"half a line")
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, after=20)
        with pytest.raises(StorageError):
            Ledger(path)
    assert verify(path).torn_bytes == 11
    assert Ledger(path).count == 10
    assert "11 bytes" in list(read(path))[-1].reason


def test_a_crash_between_lines_and_head_is_no_fraud(tmp_path):
    path = fill(tmp_path)
    head = path.with_name("ledger.head")
    for number in (0, 6):
        digest = json.loads(lines(path)[number - 1])["hash"] if number else ZERO
        head.write_bytes(json.dumps({"hash": digest, "n": number}, separators=(",", ":")).encode() + b"\n")
        assert verify(path).entries == 9
        Ledger(path).close()
        assert json.loads(head.read_bytes())["n"] == 9
    head.write_bytes(json.dumps({"hash": SHA, "n": 6}, separators=(",", ":")).encode() + b"\n")
    for call in (verify, Ledger):
        with pytest.raises(LedgerError, match=r"(?i)line 6 of the ledger was changed.*head file gives"):
            call(path)


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "size limit"),
        (errno.EIO, "fault"),
        (errno.EROFS, "read-only"),
        (errno.ENODEV, "ENODEV"),
    ],
)
def test_a_volume_that_fails_halfway_leaves_ledger_and_chain_as_before(tmp_path, monkeypatch, number, word):
    path = fill(tmp_path)
    before, head_before = path.read_bytes(), path.with_name("ledger.head").read_bytes()
    ledger = Ledger(path, site="alpha")
    head = ledger.head
    with monkeypatch.context() as patch:
        full_disk(patch, number, after=700)  # a whole line and a part of the next one
        with pytest.raises(
            StorageError, match=f"^alpha: the ledger cannot be written .*{word}.*nothing leaves"
        ) as found:
            ledger.append("run-1", 4, "round", "out", [model(), model()])
    assert "/" not in str(found.value)
    assert found.value.exit_code == 13
    assert path.read_bytes() == before
    assert path.with_name("ledger.head").read_bytes() == head_before
    assert ledger.head == head
    assert ledger.bytes_in("run-1", 4, "out") == 0
    ledger.append("run-1", 4, "round", "out", [model()])  # space again
    ledger.close()
    assert verify(path).entries == Ledger(path).count == 10


@pytest.mark.parametrize("broken", ["short write", "sync", "head sync", "head rename"])
def test_every_step_that_fails_is_taken_back(tmp_path, monkeypatch, broken):
    path = fill(tmp_path)
    ledger = Ledger(path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real_write, real_sync = os.write, os.fsync

    def fail(*_):
        raise OSError(errno.EIO, "broken")

    def sync(fd):
        if (fd == ledger._fd) == (broken == "sync"):
            fail()
        real_sync(fd)

    with monkeypatch.context() as patch:
        if broken == "short write":
            patch.setattr(os, "write", lambda fd, data: real_write(fd, data[:-1]))
        elif broken == "head rename":
            patch.setattr(os, "replace", fail)
        else:
            patch.setattr(os, "fsync", sync)
        with pytest.raises(StorageError):
            ledger.append("run-1", 4, "round", "out", [model(), model()])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    ledger.append("run-1", 4, "round", "out", [model()])
    assert verify(path).entries == ledger.count == 10


def test_a_failure_that_cannot_be_taken_back_is_dealt_with_later(tmp_path, monkeypatch):
    path = fill(tmp_path)
    ledger = Ledger(path)
    with monkeypatch.context() as patch:
        full_disk(patch, errno.EIO, after=700)
        patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        for _ in range(2):
            with pytest.raises(StorageError):
                ledger.append("run-1", 4, "round", "out", [model(), model()])
    assert verify(path).torn_bytes > 0
    left = path.read_bytes()
    ledger.append("run-1", 4, "round", "out", [model()])  # the same worker takes it back first
    assert verify(path).torn_bytes == 0
    assert ledger.count == verify(path).entries == 10
    ledger.close()
    path.write_bytes(left)  # another worker, after a crash
    digest = json.loads(left.splitlines()[8])["hash"]
    path.with_name("ledger.head").write_bytes(b'{"hash":"%s","n":9}\n' % digest.encode())
    assert Ledger(path).count == verify(path).entries == 11  # the whole line and the note about the torn one
