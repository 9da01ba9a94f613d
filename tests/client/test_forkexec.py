"""The launcher's parts: forks that obey, an app that is the installed one, refusals in plain words."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from flwr.clientapp import ClientApp

from client import forkexec
from common.errors import ConfigError, CredentialError


def run(code, **options):
    """Run code in a Python of its own: a process that forks must have one thread."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30, **options
    )


def test_children_end_with_the_code_of_their_work():
    done = run("""
        import sys
        from client.forking import BROKEN, Parent
        from common.errors import CredentialError
        parent = Parent()
        def leave(): sys.exit(3)
        def speak(): sys.exit("a text")
        def refuse(): raise CredentialError("no")
        def fall(): raise RuntimeError("oops")
        codes = [parent.wait(parent.fork(work))[0] for work in (print, leave, speak, refuse, fall)]
        assert codes == [0, 3, 1, 10, BROKEN], codes
        assert not parent.children
        print("done")
    """)
    assert done.stdout.split() == ["done"], done.stderr
    assert "RuntimeError: oops" in done.stderr


def test_fork_beside_threads_is_refused():
    done = run("""
        import threading, time
        from client.forking import Parent
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        try:
            Parent().fork(print)
        except Exception as error:
            print(type(error).__name__, error)
    """)
    assert "ProcessError This process has 2 threads and cannot fork safely" in done.stdout


def test_children_die_with_their_parent_and_do_not_run_its_cleanup():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""
            import atexit, time
            from client import forking
            atexit.register(print, "cleanup", flush=True)
            forking.exit_on_stop_signals()
            parent = forking.Parent()
            print(parent.fork(lambda: time.sleep(60)), parent.fork(lambda: time.sleep(60)), flush=True)
            time.sleep(60)
            """),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    told, kept = (psutil.Process(int(word)) for word in parent.stdout.readline().split())
    told.terminate()
    parent.kill()
    rest, _ = parent.communicate(timeout=10)
    deadline = time.monotonic() + 5
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in (told, kept)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rest == ""


def test_task_travels_as_a_line():
    task = forkexec.Task(2**63 + 1, "00ff")
    assert task.line().endswith(b"\n")
    assert forkexec.Task.parse(task.line()) == task


def test_installed_app_is_found_or_named():
    app = forkexec.load_app("client.relay:app")
    assert isinstance(app, ClientApp)
    for reference in ("absent_module:app", "client.relay:absent", "client.relay", ""):
        with pytest.raises(ConfigError, match="cannot be imported"):
            forkexec.load_app(reference)
    with pytest.raises(ConfigError, match="no Flower ClientApp"):
        forkexec.load_app("client.relay:relay")


@pytest.mark.parametrize("address", ["0.0.0.0:9094", "192.0.2.1:9094", "superlink:9094", "9094", "[::]:9094"])
def test_connection_that_leaves_the_machine_is_refused(address, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    with pytest.raises(SystemExit) as caught:
        forkexec.main(["--clientappio-address", address, "--superexec-auth-secret-file", str(secret)])
    assert caught.value.code == ConfigError.exit_code
    assert "expected a loopback address" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b""])
def test_secret_that_is_missing_or_empty(content, tmp_path, capsys):
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        forkexec.main(["--clientappio-address", "127.0.0.1:1", "--superexec-auth-secret-file", str(secret)])
    assert caught.value.code == CredentialError.exit_code
    assert "The secret's file" in capsys.readouterr().err


def launch(tmp_path, *arguments):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    command = [sys.executable, "-P", "-m", "client.forkexec", "--clientappio-address", "127.0.0.1:1"]
    process = subprocess.Popen(
        [*command, "--superexec-auth-secret-file", str(secret), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "ready: launcher" in process.stdout.readline()
    return process


def test_launcher_waits_for_its_supernode_and_stops_when_told(tmp_path):
    launcher = launch(tmp_path)
    (poller,) = psutil.Process(launcher.pid).children()
    assert not {"torch", "monai"} & {
        path.path.split("/site-packages/")[-1].split("/")[0]
        for path in psutil.Process(launcher.pid).memory_maps()
        if "/site-packages/" in path.path
    }
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(10) == 0
    assert not poller.is_running()


@pytest.mark.slow  # starts Flower's launcher once more
def test_launcher_ends_with_the_process_it_belongs_to(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    launcher = launch(tmp_path, "--parent-pid", str(owner.pid))
    assert launcher.poll() is None
    owner.communicate(b"\n")
    output, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 9
    assert "has ended" in output
