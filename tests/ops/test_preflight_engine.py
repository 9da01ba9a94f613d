"""Docker, images, machine, GPU and clock, by what their programs would say."""

import datetime
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import MismatchError, ProcessError, StorageError
from ops.pki_issue import new_authority
from ops.preflight import exit_code, fail, ok, split_sentence, to_document, warn
from ops.preflight_clock import check_clock
from ops.preflight_engine import (
    GIB,
    Answer,
    Engine,
    bytes_of,
    check_disk,
    check_engine,
    check_gpu,
    check_images,
    check_memory,
    clean_environment,
    run_program,
    version_tuple,
)
from ops.provision import _about
from ops.provision_project import Project
from tests.ops.preflighted import Programs
from tests.ops.provisioned import config

ENGINE = Engine("26.1.5", Path("/"), 32 * GIB, 8, ("nvidia", "runc"))
IMAGES = {"site-net": "wardround/site-net:0.1.0", "worker": "wardround/worker:0.1.0"}


def kit_list():
    project = Project(name="liver-2026", names=("fl.example.org",), port=9092, authority="0" * 64)
    return _about(project, "oak", config(("oak",)), new_authority("a", 10))


def test_engine_in_order():
    found, engine = check_engine(Programs())
    assert found.mark == "ok"
    assert found.found == "Docker 26.1.5+dfsg1, compose 2.26.1-4."
    assert (engine.cpus, engine.memory, engine.shifted, engine.runtimes) == (8, 32 << 30, False, ("runc",))


@pytest.mark.parametrize(
    ("info", "said", "kind"),
    [
        (Answer(127, err="docker: not found"), "no `docker` command", ProcessError),
        (Answer(1, err="Cannot connect to the Docker daemon at unix:///x"), "does not answer", ProcessError),
        (Answer(0, '{"ServerErrors": ["Cannot connect"]}'), "does not answer", ProcessError),
        (
            Answer(1, '{"ServerErrors": ["permission denied while trying"]}'),
            "may not use the engine",
            ProcessError,
        ),
        (Answer(124, err="docker: no answer within 30 s"), "does not answer", ProcessError),
        (Answer(0, "not JSON"), "does not answer", ProcessError),
    ],
)
def test_engines_that_cannot_be_used(info, said, kind):
    programs = Programs()
    programs.answers["docker info"] = info
    found, engine = check_engine(programs)
    assert engine is None
    assert said in found.found
    assert found.exit_code == kind.exit_code
    assert found.remedy


@pytest.mark.parametrize(
    ("changes", "compose", "said"),
    [
        ({"ServerVersion": "24.0.9"}, "2.26.1", "The engine is 24.0.9; 25"),
        ({}, "2.19.9", "Compose is 2.19.9; 2.20"),
        ({}, "1.29.2", "Compose is 1.29.2"),
        ({}, None, "`docker compose` does not work"),
        ({"OSType": "windows"}, "2.26.1", "windows containers"),
    ],
)
def test_old_and_other_engines(changes, compose, said):
    programs = Programs(**changes)
    programs.answers["docker compose version"] = Answer(1, err="x") if compose is None else Answer(0, compose)
    found, _ = check_engine(programs)
    assert found.mark == "fail"
    assert said in found.found
    assert found.exit_code in (MismatchError.exit_code, ProcessError.exit_code)


@pytest.mark.parametrize("option", ["name=rootless", "name=userns"])
def test_engine_that_maps_users_is_known(option):
    _, engine = check_engine(Programs(SecurityOptions=["name=seccomp,profile=builtin", option]))
    assert engine.shifted


@pytest.mark.parametrize(
    ("text", "expected"),
    [("26.1.5+dfsg1", (26, 1)), ("v2.20.3", (2, 20)), ("2.26.1-4\n", (2, 26)), ("", (0, 0)), ("dev", (0, 0))],
)
def test_versions(text, expected):
    assert version_tuple(text) == expected


def test_images():
    programs = Programs()
    there = check_images(IMAGES, "0.1.0", programs)
    assert there.mark == "ok"
    assert "wardround/" not in there.found  # a registry's name is the hospital's: for this terminal alone
    assert "wardround/worker:0.1.0" in there.detail
    assert all("org.opencontainers.image.version" in call for call in programs.calls)
    other = check_images(IMAGES, "0.2.0", programs)
    assert other.exit_code == MismatchError.exit_code
    assert "worker:0.1.0 (0.1.0)" in other.found
    programs.answers["docker image inspect"] = Answer(0, "<no value>\n")
    assert "<no value>" in check_images(IMAGES, "0.1.0", programs).found
    programs.answers["docker image inspect"] = Answer(1, err="Error: No such image")
    missing = check_images(IMAGES, "0.1.0", programs)
    assert "Not on this machine: site-net:0.1.0, worker:0.1.0." in missing.found
    assert "docker load" in missing.remedy


@pytest.mark.parametrize(
    ("engine", "environ", "mark", "said"),
    [
        (ENGINE, {}, "ok", "limits 6.0 GiB and 2 processors"),
        (ENGINE, {"WARDROUND_WORKER_MEMORY": "40g"}, "warn", "42.0 GiB together"),
        (ENGINE, {"WARDROUND_NET_MEMORY": "lots"}, "fail", "is no amount"),
        (ENGINE, {"WARDROUND_WORKER_CPUS": "two"}, "fail", "is no amount"),
        (ENGINE, {"WARDROUND_WORKER_CPUS": "16"}, "fail", "the engine refuses"),
        (Engine("26", Path("/"), 32 * GIB, 1), {}, "fail", "2 processors, which the engine refuses"),
        (Engine("26", Path("/"), 3 * GIB, 4), {}, "warn", "3.0 GiB memory"),
    ],
)
def test_memory_and_processors(engine, environ, mark, said):
    found = check_memory(engine, environ)
    assert found.mark == mark
    assert said in found.found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4g", 4 << 30),
        ("512M", 512 << 20),
        ("1.5gb", 3 << 29),
        ("1048576", 1 << 20),
        ("0", None),
        ("4x", None),
        ("", None),
    ],
)
def test_amounts(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize(("free", "mark"), [(1, "fail"), (5, "warn"), (100, "ok")])
def test_disk(free, mark):
    found = check_disk(ENGINE, lambda _: SimpleNamespace(free=free * GIB))
    assert found.mark == mark
    assert f"{free}.0 GiB free" in found.found
    assert (found.exit_code == StorageError.exit_code) == (mark == "fail")


def test_disk_of_an_engine_elsewhere_is_not_judged():
    assert check_disk(Engine("26", Path("/no/such/folder"), 1, 1)).mark == "skipped"


def test_gpu():
    smi = {"nvidia-smi": Answer(0, "NVIDIA H200, 143771 MiB\n")}
    programs = Programs()
    assert check_gpu(False, "auto", ENGINE, programs).mark == "skipped"
    assert check_gpu(False, "cpu", None, programs).mark == "skipped"
    forgotten = check_gpu(False, "cuda:1", ENGINE, programs)
    assert forgotten.mark == "fail"
    assert "no GPU without --gpu" in forgotten.found
    assert check_gpu(True, "auto", None, programs).mark == "skipped"
    bare = Engine("26", Path("/"), GIB, 8, ("runc",))
    assert "no NVIDIA runtime" in check_gpu(True, "cuda", bare, programs).found
    assert check_gpu(True, "cuda", ENGINE, programs).mark == "warn"  # no nvidia-smi where the command runs
    programs.answers |= smi
    assert "NVIDIA H200, 143771 MiB." in check_gpu(True, "cuda", ENGINE, programs).found
    assert (
        check_gpu(True, "cuda", Engine("28", Path("/"), GIB, 8, ("runc",), cdi=True), programs).mark == "ok"
    )
    assert check_gpu(True, "cpu", ENGINE, programs).mark == "warn"
    programs.answers["nvidia-smi"] = Answer(9, "NVIDIA-SMI has failed\n")
    assert check_gpu(True, "cuda", ENGINE, programs).mark == "fail"


def test_clock():
    about, programs = kit_list(), Programs()
    day = datetime.timedelta(days=1)
    now = about.created + datetime.timedelta(hours=1)
    assert (
        "fits the kit's dates; not checked against a time server."
        in check_clock(about, None, run=programs, now=now).found
    )
    seen = (now - day).timestamp()
    assert "and the coordinator's certificate" in check_clock(about, seen, run=programs, now=now).found
    for wrong in (
        check_clock(about, None, run=programs, now=about.created - 2 * day),
        check_clock(about, (now + day).timestamp(), run=programs, now=now),
        check_clock(about, None, run=programs, now=about.expires + day),
    ):
        assert wrong.mark == "fail"
        assert "clock" in wrong.remedy.lower()
    for state, mark in (("yes", "ok"), ("no", "warn"), ("", "ok")):
        programs.answers["timedatectl"] = Answer(0, f"{state}\n")
        assert check_clock(about, seen, run=programs, now=now).mark == mark
    assert check_clock(None, None, run=programs, now=now).mark == "ok"


def test_programs_are_run_with_patience_and_never_raise():
    assert run_program([sys.executable, "-c", "print('out')"], 20) == Answer(0, "out\n")
    broken = run_program(
        [sys.executable, "-c", "import sys; print('a\\nwhy', file=sys.stderr); sys.exit(3)"], 20
    )
    assert (broken.code, broken.words) == (3, "why")
    assert run_program(["no-such-program-here"]).code == 127
    assert run_program([sys.executable, "-c", "import time; time.sleep(9)"], 0.2).code == 124


def test_variables_that_would_lead_compose_elsewhere_are_left_out(monkeypatch):
    monkeypatch.setenv("COMPOSE_FILE", "/elsewhere.yaml")
    monkeypatch.setenv("DOCKER_HOST", "unix:///here")
    found = clean_environment({"WARDROUND_KIT": "/kit"})
    assert "COMPOSE_FILE" not in found
    assert (found["DOCKER_HOST"], found["WARDROUND_KIT"]) == ("unix:///here", "/kit")


@pytest.mark.parametrize(
    ("sentence", "found", "remedy"),
    [
        ("The kit expired on 2026-01-01 12:30 UTC: ask for a new one.", "The kit expired on 2026-01-01 12:30 UTC.", "Ask for a new one."),
        ("It differs: badly. Do not use it: ask.", "It differs: badly.", "Do not use it: ask."),
        ("Site oak: others can read it: run `chmod 600`.", "Site oak: others can read it.", "Run `chmod 600`."),
        ("Give one, e.g. /run/x.sock", "Give one, e.g. /run/x.sock", ""),
    ],
)  # fmt: skip
def test_sentences_are_divided(sentence, found, remedy):
    assert split_sentence(sentence) == (found, remedy)


def test_exit_code_is_that_of_the_first_failure():
    rows = [ok("a", "x"), warn("b", "y", "z"), fail("c", "x", "y", kind=MismatchError), fail("d", "x", "y")]
    assert exit_code(rows) == MismatchError.exit_code
    assert exit_code(rows[:2]) == 0
    document = to_document("oak", [fail("c", "x", "y", "/a/private/path")])
    assert document["ready"] is False
    assert "private" not in str(document)
