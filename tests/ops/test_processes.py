"""Processes: watched while they run, gone with everything they started, whoever dies first."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from common.errors import ProcessError, WardroundError
from common.events import EventLog, read_events
from ops.processes import Process, ProcessGroup, explain, session_members

# A leader with a child in its session, a grandchild in a session of its own, and one that ignores SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
deaf = [sys.executable, "-c", ignore]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True), subprocess.Popen(deaf)]
print(*(child.pid for child in children), flush=True)
time.sleep(60)
"""


def python(code, name="one", tmp_path=None, **options):
    return Process(name, [sys.executable, "-c", textwrap.dedent(code)], tmp_path / f"{name}.log", **options)


def lines_of(process, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not process.tail():
        assert time.monotonic() < deadline, "the process wrote nothing"
        time.sleep(0.01)
    return process.tail().splitlines()


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids, timeout=5.0):
    deadline = time.monotonic() + timeout
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(running, pids))


@pytest.fixture
def group(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", "trial")
    with ProcessGroup(log) as made:
        yield made
    log.close()


def test_environment_folder_and_log(group, tmp_path):
    code = "import os, sys; print(os.environ['GREETING'], os.getcwd()); print('err', file=sys.stderr)"
    process = group.start(python(code, tmp_path=tmp_path, env={"GREETING": "hello"}, cwd=tmp_path))
    with pytest.raises(ProcessError):
        group.wait_ready("one", lambda: False, timeout=10)
    assert process.tail().splitlines() == [f"hello {tmp_path}", "err"]


def test_process_that_ends_is_named_with_code_and_log(group, tmp_path):
    group.start(python("import time; time.sleep(60)", "fine", tmp_path))
    code = "import sys\nfor i in range(40): print('line', i)\nsys.exit(10)"
    group.start(python(code, "supernode-oak", tmp_path, site="oak"))
    with pytest.raises(ProcessError, match=r"'supernode-oak' ended with code 10 \(credential\)") as caught:
        group.wait_ready("fine", lambda: False, timeout=10)
    assert caught.value.detail.splitlines() == [f"line {i}" for i in range(25, 40)]
    assert caught.value.site == "oak"
    assert "line" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_ready_timeout_names_the_process(group, tmp_path):
    group.start(python("print('still loading', flush=True); import time; time.sleep(60)", tmp_path=tmp_path))
    lines_of(group.processes["one"])
    with pytest.raises(ProcessError, match=r"Not ready within 0\.2 s: one\.") as caught:
        group.wait_ready("one", lambda: False, timeout=0.2)
    assert "still loading" in caught.value.detail


def test_events(group, tmp_path):
    for name in ("a", "b"):
        group.start(python("import time; time.sleep(60)", name, tmp_path, site="oak" if name == "b" else ""))
    group.wait_ready(["a", "b"], lambda: True, timeout=1)
    pid = group.processes["a"].pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match="'a' ended by signal SIGKILL"):
        group.wait_ready("b", lambda: False, timeout=10)
    group.stop_all()
    events = [
        {key: event[key] for key in ("event", "name", "pid", "code", "expected", "site") if key in event}
        for event in read_events(tmp_path / "events.jsonl")
    ]
    assert events == [
        {"event": "process.start", "name": "a", "pid": pid},
        {"event": "process.start", "name": "b", "pid": group.processes["b"].pid, "site": "oak"},
        {"event": "process.ready", "name": "a"},
        {"event": "process.ready", "name": "b", "site": "oak"},
        {"event": "process.exit", "name": "a", "code": -9, "expected": False},
        {"event": "process.exit", "name": "b", "code": -15, "expected": True, "site": "oak"},
    ]


def test_stop_all_leaves_no_descendant(group, tmp_path):
    process = group.start(python(FAMILY, tmp_path=tmp_path))
    children = [int(word) for word in lines_of(process)[0].split()]
    assert all(map(running, children))
    start = time.monotonic()
    group.stop_all(seconds=1.0)
    assert time.monotonic() - start < 4
    assert gone([process.pid, *children], timeout=0.5)
    assert process.exit_code() == -signal.SIGTERM
    assert not session_members({process.pid})


def test_children_of_a_crashed_leader_are_cleared_too(group, tmp_path):
    process = group.start(python(FAMILY, tmp_path=tmp_path))
    inside, escaped, deaf = (int(word) for word in lines_of(process)[0].split())
    os.kill(process.pid, signal.SIGKILL)
    os.kill(escaped, signal.SIGKILL)  # an orphan in a session of its own is out of reach
    with pytest.raises(ProcessError):
        group.wait_ready("one", lambda: False, timeout=10)
    assert running(inside)
    assert running(deaf)
    group.stop_all(seconds=0.2)
    assert gone([inside, deaf], timeout=0.5)


def test_last_started_is_told_first(group, tmp_path):
    code = """
    import signal, sys, time
    def end(*_): open(sys.argv[1], "a").write(sys.argv[2] + "\\n"); sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    time.sleep(60)
    """
    for name in "abc":
        process = python(code, name, tmp_path)
        process.argv = [*process.argv, str(tmp_path / "order"), name]
        lines_of(group.start(process))
    group.stop("c")
    assert group.processes["c"].exit_code() == 0
    group.poll()  # told to end: no error
    group.stop_all()
    assert sorted((tmp_path / "order").read_text().split()) == ["a", "b", "c"]
    assert (tmp_path / "order").read_text().startswith("c")


def test_deaf_process_is_killed_in_bounded_time(group, tmp_path):
    code = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)
    """
    process = group.start(python(code, tmp_path=tmp_path))
    lines_of(process)
    start = time.monotonic()
    group.stop_all(seconds=0.3)
    assert 0.2 < time.monotonic() - start < 2
    assert process.exit_code() == -signal.SIGKILL


def test_nothing_survives_a_killed_trial(tmp_path):
    code = f"""
    import sys, time
    from pathlib import Path
    from ops.processes import Process, ProcessGroup
    group = ProcessGroup()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    for name in "ab":
        group.start(Process(name, sleep, Path({str(tmp_path)!r}, name)))
    print(*(process.pid for process in group.processes.values()), flush=True)
    time.sleep(60)
    """
    trial = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in trial.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(running, pids))
    trial.kill()
    trial.communicate()
    assert gone(pids)


def test_name_can_be_used_again_after_the_end_only(group, tmp_path):
    group.start(python("import time; time.sleep(60)", tmp_path=tmp_path))
    with pytest.raises(ProcessError, match="'one' is running already"):
        group.start(python("pass", tmp_path=tmp_path))
    first = group.processes["one"]
    os.kill(first.pid, signal.SIGKILL)
    assert gone([first.pid])
    with pytest.raises(ProcessError):
        group.poll()
    group.stop("one")  # seen and cleared away
    group.poll()
    second = group.start(python("import time; time.sleep(60)", tmp_path=tmp_path))
    group.poll()
    assert group.processes["one"] is second


def test_program_that_does_not_exist(group, tmp_path):
    with pytest.raises(ProcessError, match="'one' cannot be started") as caught:
        group.start(Process("one", [str(tmp_path / "absent")], tmp_path / "log"))
    assert str(tmp_path) not in str(caught.value)
    assert "one" not in group.processes


def test_start_from_another_thread_is_refused(group, tmp_path):
    caught = []

    def start():
        try:
            group.start(python("pass", tmp_path=tmp_path))
        except WardroundError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_memory_counts_children_and_keeps_the_peak(group, tmp_path):
    code = """
    import subprocess, sys, time
    hold = "import time; x = bytearray(60_000_000); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", hold])
    time.sleep(60)
    """
    process = group.start(python(code, tmp_path=tmp_path))
    lines_of(process)
    now, peak = group.memory()["one"]
    assert 60 < now <= peak < 200
    group.stop_all(1)
    assert group.memory()["one"] == (0.0, peak)


def test_exit_codes_in_words():
    assert explain(0) == "with code 0"
    assert explain(7) == "with code 7 (worker)"
    assert explain(-9) == "by signal SIGKILL (perhaps out of memory)"
    assert explain(-15) == "by signal SIGTERM"
