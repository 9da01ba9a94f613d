"""A project's coordinator: what is refused before anything starts, who is waited for, and who may come meanwhile."""

import json
import os
import shutil
import socket
from types import SimpleNamespace

import pytest

from common.errors import ConfigError, CredentialError, DataError, ProcessError
from common.events import EventLog, read_events
from common.federation import Federation, write_federation
from ops import arrivals as arrivals_module
from ops import run as module
from ops.admission import LOOK_SECONDS, Watch, check_still_admitted, choose_admitted, credentials
from ops.approve import revoke
from ops.arrivals import Arrivals
from ops.flower_commands import Addresses
from ops.options import Options
from ops.pki import load_public_pem
from ops.plan import make_plan, make_run_plan
from ops.provision_project import read_project
from ops.run import Place, ProjectRun, checked, read_note, resume_project_run, run_project
from tests.harness import FEATURES, write_table_site
from tests.ops.provisioned import project

DATA = {
    "task": "tabular",
    "spatial_dims": 0,
    "channels": list(FEATURES),
    "labels": ["well", "ill"],
    "patch": [],
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A project with two sites that are admitted (their kits hold keys) and one that is not."""
    folder = project(tmp_path_factory.mktemp("t") / "liver", ("oak", "elm", "ash"), keys="central").folder
    revoke("ash", folder, "not there yet")
    return folder


@pytest.fixture
def made(template, tmp_path):
    return shutil.copytree(template, tmp_path / "liver")


@pytest.fixture
def described(tmp_path):
    return write_federation(
        tmp_path / "described", Federation("tables", settings={"data": DATA, "rounds": {"rounds": 7}})
    )


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def place(made, port, **changes):
    return Place(made, **{"listen": f"127.0.0.1:{port}", "control": "127.0.0.1:39093"} | changes)


# ---- before anything starts ------------------------------------------------------------------------------------------


def test_everyone_who_is_admitted_takes_part_or_those_named(made):
    known = read_project(made)
    assert choose_admitted(known, None) == ["elm", "oak"]
    assert choose_admitted(known, " oak ,elm,oak") == ["oak", "elm"]
    with pytest.raises(
        ConfigError, match=r"Not admitted: ash\. Approve its request with `wardround site approve"
    ):
        choose_admitted(known, "oak,ash")
    with pytest.raises(ConfigError, match="Did you mean 'oak'"):
        choose_admitted(known, "oat")
    with pytest.raises(ConfigError, match="names nobody"):
        choose_admitted(known, " , ")
    for alias in ("oak", "elm"):
        revoke(alias, made, "left")
    with pytest.raises(ConfigError, match="No site of project 'liver-2026' is admitted yet"):
        choose_admitted(read_project(made), None)


def test_the_plan_is_that_of_a_trial_without_its_data(described, tmp_path):
    for alias in ("elm", "oak"):
        write_table_site(described.parent / alias, seed=1)
    options = Options(rounds=3, seed=5, settings=("batch_size=2", "quorum=0.5"))
    there = make_plan(options, described.parent, tmp_path / "out", runtime="fast")
    here = make_run_plan(options, described, ["elm", "oak"], tmp_path / "out")
    assert here.config == there.config
    assert (here.method, here.federation, here.runtime) == (there.method, there.federation, "fast")
    assert list(here.sites) == ["elm", "oak"]
    assert make_run_plan(options, described.parent, ["elm", "oak"], tmp_path).config == here.config


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"method": "fedavgg"}, ConfigError, "Did you mean 'fedavg'"),
        ({"settings": ("qourum=1",)}, ConfigError, "Did you mean 'quorum'"),
        ({"settings": ("quorum=2",)}, ConfigError, "quorum"),
        ({"settings": ("mu=1",)}, ConfigError, "mu"),
        ({"sites": "ash"}, ConfigError, "Not admitted: ash"),
    ],
)
def test_what_cannot_run_is_refused_and_no_folder_is_left(
    made, described, port, changes, kind, said, tmp_path
):
    options = Options(**{"out": tmp_path / "out"} | changes)
    with pytest.raises(kind, match=said):
        run_project(options, described, place(made, port))
    assert not (tmp_path / "out").exists()


def test_without_a_federation_or_a_project_nothing_starts(made, described, port, tmp_path):
    with pytest.raises(DataError, match="--federation names no file"):
        checked(Options(), tmp_path / "federation.json", place(made, port))
    bare = write_federation(tmp_path / "bare", Federation("bare", settings={"rounds": {"rounds": 2}}))
    with pytest.raises(ConfigError, match="has no 'data'"):
        checked(Options(), bare, place(made, port))
    with pytest.raises(ConfigError, match="no project in this folder"):
        checked(Options(), described, place(tmp_path, port))


def test_credentials_that_do_not_fit_are_named(made, described, port, template, tmp_path):
    other = project(tmp_path / "other").folder
    shutil.copy(other / "coordinator" / "server.key", made / "coordinator" / "server.key")
    with pytest.raises(CredentialError, match="key"):
        checked(Options(), described, place(made, port))
    shutil.copy(template / "coordinator" / "server.key", made / "coordinator" / "server.key")
    (made / "coordinator" / "secret").unlink()
    with pytest.raises(CredentialError, match="The secret of the coordinator's processes cannot be read"):
        checked(Options(), described, place(made, port))


def test_a_port_in_use_is_one_sentence(made, described, port):
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ProcessError, match=f"The project's port {port} cannot be used") as caught:
            checked(Options(), described, place(made, port))
        assert str(os.getpid()) in caught.value.detail
        with pytest.raises(ProcessError, match=f"Port {port} for the Control API .* --control 127"):
            checked(Options(), described, place(made, port + 1, control=f"127.0.0.1:{port}"))


@pytest.mark.parametrize("control", ["0.0.0.0:9093", "fl.example.org:9093", "127.0.0.1"])
def test_the_control_api_is_never_opened_to_others(made, described, port, control):
    with pytest.raises(ConfigError, match="--control must be a port of this machine's loopback"):
        checked(Options(), described, place(made, port, control=control))


def test_the_fleet_port_is_the_projects_unless_another_is_given(made):
    known = read_project(made).model_copy(update={"port": 39555})
    assert Place(made, "127.0.0.1", "127.0.0.1:39093").addresses(known).fleet == "127.0.0.1:39555"
    assert Place(made, "127.0.0.1:39556", "127.0.0.1:39093").addresses(known).fleet == "127.0.0.1:39556"


def test_a_project_is_only_read(made, tmp_path):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in sorted(made.rglob("*"))}

    before = state()
    pki = credentials(made, tmp_path / "keys")
    assert state() == before
    assert sorted(pki.site_public) == ["elm", "oak"]
    assert all(path.parent == tmp_path / "keys" / "sites" for path in pki.site_public.values())
    assert load_public_pem(pki.site_public["oak"], site="oak")


def test_a_run_that_is_not_a_projects_is_not_continued_as_one(tmp_path):
    assert read_note(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"config": {}}))
    assert read_note(tmp_path) is None
    with pytest.raises(ConfigError):
        resume_project_run(tmp_path, project=tmp_path)


# ---- who comes -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def plan(described, tmp_path):
    return make_run_plan(Options(), described, ["elm", "oak"], tmp_path / "run")


@pytest.fixture
def logs(plan):
    own, server = (
        EventLog(plan.out / "events-trial.jsonl", "trial"),
        EventLog(plan.out / "events.jsonl", "server"),
    )

    def told(event):
        return [item for item in read_events(plan.out / "events-trial.jsonl") if item["event"] == event]

    return SimpleNamespace(own=own, server=server, told=told)


def test_who_is_waited_for_is_told_by_alias_until_the_first_round(plan, logs):
    clock = Clock()
    came = Arrivals(plan, logs.own, clock)
    came.look()
    assert not logs.told("warning")  # sites that are up need some seconds
    clock.now += arrivals_module.GRACE_SECONDS
    came.connected({"oak"})
    came.look()
    (first,) = logs.told("warning")
    assert first["code"] == "waiting"
    assert "2 of 2 sites (not connected: elm; connected, no first answer yet: oak)" in first["message"]
    assert "up to 5 min 00 s" in first["message"]
    logs.server.emit("site.ready", site="oak", cases={}, device="cpu", software="1", check={})
    came.look()
    assert len(logs.told("warning")) == 1  # not more often than every half minute
    clock.now += arrivals_module.AGAIN_SECONDS
    came.look()
    came.look()
    assert "1 of 2 sites (not connected: elm)" in logs.told("warning")[1]["message"]
    assert came.never == ["elm"]
    logs.server.emit("round.start", round=1, sites=["oak"], closing=False)
    came.look()
    assert [item["phase"] for item in logs.told("trial.phase")] == ["run"]
    clock.now += 1000
    came.look()
    assert len(logs.told("warning")) == 2


def test_a_site_that_gave_no_first_answer_is_still_missing_and_one_refused_is_not(plan, logs):
    came = Arrivals(plan, logs.own, Clock())
    logs.server.emit("site.refused", site="elm", code="silent", message="elm: gave no first answer.")
    logs.server.emit("site.refused", site="oak", code="mismatch", message="oak: does not fit.")
    came.look()
    assert came.never == ["elm"]


def test_a_project_is_looked_at_every_few_seconds_and_read_when_it_changed(made):
    clock = Clock()
    watch = Watch(made, clock)
    revoke("oak", made, "left")
    assert watch.changed() is None  # looked just now
    clock.now += LOOK_SECONDS
    assert watch.changed().sites["oak"].public_key == ""
    clock.now += LOOK_SECONDS
    assert watch.changed() is None
    assert not watch.blind
    text = (made / "project.json").read_text()
    (made / "project.json").write_text(text[:100])
    clock.now += LOOK_SECONDS
    assert watch.changed() is None  # half a file changes nobody's admission
    (made / "project.json").write_text(text)
    clock.now += LOOK_SECONDS
    assert watch.changed().sites["elm"].public_key
    (made / "project.json").unlink()
    clock.now += LOOK_SECONDS
    assert watch.changed() is None


class FakeCoordinator:
    """Says what it was told, and ends the run after some looks."""

    def __init__(self, plan, addresses, pki, group, events, *, env, idle, sites):
        self.sites, self.did, self.left, self.mending = sites, [], 6, 1
        self.end = {"verdict": "ok"}
        self.nodes = [
            SimpleNamespace(online=True, public_key=load_public_pem(pki.site_public["oak"], site="oak"))
        ]
        self.control = SimpleNamespace(nodes=lambda: self.nodes)
        FakeCoordinator.made = self

    def start_link(self):
        self.did.append("link")

    def start_app(self):
        self.did.append("app")

    def readmit(self, keys):
        self.mending -= 1
        self.did.append(sorted(keys))
        return self.mending < 0

    def tend(self):
        self.left -= 1
        self.during(self.left)
        return self.end if not self.left else None

    def during(self, left):
        pass

    def close(self):
        self.did.append("closed")


@pytest.fixture
def run(plan, logs, made, monkeypatch):
    monkeypatch.setattr(module, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("ops.admission.LOOK_SECONDS", 0.0)
    addresses = Addresses("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
    made_run = ProjectRun(plan, Place(made), addresses, logs.own, lambda: None)
    made_run.start()
    made_run.fake = FakeCoordinator.made
    return made_run


def test_every_admitted_key_is_registered_also_of_sites_that_do_not_take_part(run):
    assert run.fake.sites.aliases == ["elm", "oak"]
    assert run.watch() == {"verdict": "ok"}
    run.stop()
    assert run.fake.did == ["link", "app", "closed"]


def test_who_is_revoked_meanwhile_is_sent_away_also_when_the_link_is_being_mended(run, logs, made):
    run.fake.during = lambda left: left == 4 and revoke("oak", made, "laptop stolen")
    run.watch()
    assert run.fake.did[2:] == [["elm"], ["elm"]]  # the first time the SuperLink was away
    assert [(item["site"], item["code"]) for item in logs.told("warning")] == [("oak", "revoked")]


def test_a_link_that_does_not_take_a_revocation_is_told_again_and_the_operator_once(
    run, logs, made, monkeypatch
):
    monkeypatch.setattr(module, "READMIT_SECONDS", 0.0)
    refusing = [True, True, False]

    def readmit(keys):
        run.fake.did.append(sorted(keys))
        if refusing.pop(0):
            raise ProcessError("Cannot register a site's key: the SuperLink answered INTERNAL.")
        return True

    run.fake.readmit, run.fake.left = readmit, 12
    run.fake.during = lambda left: left == 10 and revoke("oak", made, "laptop stolen")
    run.watch()
    assert run.fake.did[2:] == [["elm"]] * 3
    assert [item["code"] for item in logs.told("warning")] == ["revoked", "process"]


def test_a_run_goes_on_without_a_revoked_site_while_its_quorum_holds(made, described, tmp_path):
    def config(quorum):
        options = Options(settings=(f"quorum={quorum}",))
        return make_run_plan(options, described, ["elm", "oak"], tmp_path / "out").config

    check_still_admitted(read_project(made), config(1))
    revoke("oak", made, "left")
    check_still_admitted(read_project(made), config(0.5))
    with pytest.raises(
        ConfigError, match=r"Not admitted any more: oak\. 1 of the run's 2 sites are left, it needs 2"
    ):
        check_still_admitted(read_project(made), config(1))
    revoke("elm", made, "left")
    with pytest.raises(ConfigError, match="0 of the run's 2 sites are left"):
        check_still_admitted(read_project(made), config(0.5))


def test_a_project_that_cannot_be_read_any_more_is_told_once_for_a_revocation_would_not_be_seen(
    run, logs, made
):
    def change(left):
        if left == 5:
            (made / "project.json").rename(made / "away.json")
        elif left == 1:
            (made / "away.json").rename(made / "project.json")

    run.fake.during, run.fake.left = change, 12
    run.watch()
    (warning,) = logs.told("warning")
    assert warning["code"] == "storage"
    assert "approvals and revocations do not reach this run" in warning["message"]
    assert not run._watch.blind
    assert len(run.fake.did) == 2  # nobody's admission changed


def test_sites_that_never_came_are_named_with_what_to_do(run):
    run.fake.end = {"verdict": "failed", "code": "quorum", "message": "1 of 2 sites answered, 2 are needed."}
    end = run.watch()
    assert end["message"].startswith(
        "1 of 2 sites answered, 2 are needed. Never connected: elm. There: start"
    )
    assert "fl.example.org:9092" in end["message"]
    assert end["message"].endswith("Then let the run go on.")


def test_a_failure_that_has_nothing_to_do_with_sites_is_told_as_it_is(run):
    run.fake.end = {"verdict": "failed", "code": "payload", "message": "why"}
    assert run.watch()["message"] == "why"
