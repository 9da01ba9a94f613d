"""The patches of Flower: they do what they say on the pinned version, and step back from any other."""

import importlib
import importlib.metadata
import inspect
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import flower_fast

SUPERNODE = importlib.import_module("flwr.supernode.start_client_internal")
OBJECTS = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
SERVERAPP = importlib.import_module("flwr.server.serverapp.app")
TELEMETRY = importlib.import_module("flwr.supercore.telemetry")
RELAY = importlib.import_module("flwr.supernode.runtime.run_clientapp")
GRID = importlib.import_module("flwr.superlink.grid.grpc_grid")
CONNECTION = importlib.import_module("flwr.client.grpc_rere_client.connection")
PULLS = (OBJECTS.pull_objects, OBJECTS.pull_and_inflate_object_from_tree)
NAMES = {
    SUPERNODE: ("time", "_pull_and_store_message"),
    SERVERAPP: ("flush_logs",),
    TELEMETRY: ("create_event", "FLWR_TELEMETRY_ENABLED"),
    RELAY: ("install_from_fab", "get_load_client_app_fn", "ClientAppIoStub"),
    CONNECTION: ("create_channel",),
    GRID: ("pull_objects",),
}
ROLES = ("supernode", "relay", "server")


def state():
    named = {(module.__name__, name): getattr(module, name) for module in NAMES for name in NAMES[module]}
    return named, [dict(function.__kwdefaults__) for function in PULLS]


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    """Flower as installed, before and after; telemetry is off, as in every process that wardround starts."""
    for module, names in NAMES.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    for function in PULLS:
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__))
    monkeypatch.setattr(TELEMETRY, "FLWR_TELEMETRY_ENABLED", "0")


@pytest.fixture
def slept(monkeypatch):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


@pytest.mark.parametrize("role", ROLES)
def test_everything_applies_to_the_pinned_version_once_and_again(role):
    assert flower_fast.apply(role=role) == []
    after = state()
    assert flower_fast.apply(role=role) == []
    assert state() == after


def test_supernode_sleeps(slept):
    flower_fast.apply(role="supernode")
    for seconds in (3, 0.5, 3, 7):
        SUPERNODE.time.sleep(seconds)
    assert slept == [0.3, 0.05, 0.3, 7]
    assert SUPERNODE.time.monotonic is time.monotonic
    assert time.sleep == slept.append  # nobody else's clock was touched


def test_idle_supernode_asks_less_often_until_work_comes(slept, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    flower_fast.apply(role="supernode")
    for pause in (60, 200, 10_000):
        now[0] += pause
        SUPERNODE.time.sleep(3)
    SUPERNODE.time.sleep(0.5)
    SUPERNODE.time.sleep(3)
    assert slept == pytest.approx([0.6, 2.6, 3.0, 0.05, 0.3])


@given(st.floats(0, 1e9))
def test_waiting_costs_a_hundredth_at_most(waited):
    nap = flower_fast.idle_seconds(waited, 0.3, 3)
    assert 0.3 <= nap <= 3
    assert nap <= max(0.3, waited / 100)


@pytest.mark.parametrize("role", ROLES)
def test_objects_that_come_late_are_fetched_at_once(role):
    tries = []

    def pull(object_id):
        tries.append(object_id)
        if len(tries) < 3:
            raise OBJECTS.ObjectUnavailableError(object_id)
        return b"content"

    flower_fast.apply(role=role)
    start = time.monotonic()
    assert OBJECTS.pull_objects(["a"], pull) == {"a": b"content"}
    assert time.monotonic() - start < 0.6  # 0.05 + 0.1 s and their jitter; Flower: 3 s


def test_short_waits_do_not_give_up_earlier():
    stock_limits = [(f.__kwdefaults__["max_time"], f.__kwdefaults__["max_tries_per_object"]) for f in PULLS]
    assert stock_limits == [(7200, 500)] * 2
    flower_fast.apply(role="relay")
    for function in PULLS:
        assert function.__kwdefaults__["max_time"] == 7200
        waited = (
            function.__kwdefaults__["max_tries_per_object"] * function.__kwdefaults__["backoff_cap"] * 0.8
        )
        assert waited > 7200


def late(object_id, arrived):
    if time.monotonic() < arrived[object_id]:
        raise OBJECTS.ObjectUnavailableError(object_id)
    return object_id.encode()


def test_an_answer_whose_sender_is_gone_is_given_up(monkeypatch):
    assert flower_fast.apply(role="server") == []
    monkeypatch.setattr(flower_fast, "STALLED_SECONDS", 0.4)
    arrived = {"a": 0.0, "b": time.monotonic() + 3600}
    with pytest.raises(OBJECTS.ObjectUnavailableError, match="'b'"):
        GRID.pull_objects(["a", "b"], lambda name: late(name, arrived))
    assert time.monotonic() < arrived["b"] - 3590


def test_an_answer_that_comes_slowly_is_waited_for(monkeypatch):
    assert flower_fast.apply(role="server") == []
    monkeypatch.setattr(flower_fast, "STALLED_SECONDS", 0.8)
    arrived = {str(number): time.monotonic() + 0.5 * number for number in range(4)}
    found = GRID.pull_objects(list(arrived), lambda name: late(name, arrived))
    assert found == {name: name.encode() for name in arrived}


def test_an_answer_that_the_superlink_forgot_is_a_lost_one_and_not_the_end(monkeypatch):
    assert flower_fast.apply(role="server") == []

    def forgotten(name):
        raise OBJECTS.ObjectIdNotPreregisteredError(name)

    with pytest.raises(OBJECTS.ObjectUnavailableError):
        GRID.pull_objects(["a"], forgotten)


def test_log_is_flushed_shortly_at_the_end(monkeypatch):
    timeouts = []
    parameters = inspect.signature(SERVERAPP.flush_logs)

    def flush_logs(log_queue, timeout=3.0):
        timeouts.append(timeout)
        return True

    flush_logs.__signature__ = parameters
    monkeypatch.setattr(SERVERAPP, "flush_logs", flush_logs)
    assert flower_fast.apply(role="server") == []
    assert SERVERAPP.flush_logs("queue") is True
    assert timeouts == [0.5]


def test_telemetry_is_silenced_only_when_it_is_off(monkeypatch):
    original = TELEMETRY.create_event
    monkeypatch.setattr(TELEMETRY, "FLWR_TELEMETRY_ENABLED", "1")
    flower_fast.apply(role="relay")
    assert TELEMETRY.create_event is original
    monkeypatch.setattr(TELEMETRY, "FLWR_TELEMETRY_ENABLED", "0")
    flower_fast.apply(role="relay")
    future = TELEMETRY.event(TELEMETRY.EventType.FLWR_CLIENTAPP_RUN_ENTER)
    assert future.result(timeout=5) == "disabled"
    assert TELEMETRY.create_event is not original


def test_supernode_goes_on_after_a_message_that_got_lost(monkeypatch):
    monkeypatch.setattr(flower_fast, "_expect", lambda fact, what: None)
    monkeypatch.setattr(SUPERNODE, "_pull_and_store_message", lambda *, state: state.answer)
    flower_fast.apply(role="supernode")
    for stored, answer, expected in (
        ({}, 7, None),
        ({"id": 1}, 7, 7),
        ({}, None, None),
        ({"id": 1}, None, None),
    ):
        given = types.SimpleNamespace(msg_store=stored, answer=answer)
        assert SUPERNODE._pull_and_store_message(state=given) == expected


@pytest.mark.parametrize("role", ROLES)
def test_another_version_is_left_alone(role, monkeypatch, caplog):
    before = state()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.33.0")
    warnings = flower_fast.apply(role=role)
    assert len(warnings) == 1
    assert "1.33.0" in warnings[0]
    assert "1.32.1" in warnings[0]
    assert caplog.messages == warnings
    assert state() == before


def test_missing_flower_is_a_warning(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "unknown" in flower_fast.apply(role="relay")[0]


def changed_source(monkeypatch, old, new):
    """Let the source of Flower's modules read otherwise."""
    original = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: original(thing).replace(old, new))


@pytest.mark.parametrize(
    ("role", "old", "new", "fact", "untouched"),
    [
        ("supernode", "time.sleep(3)", "time.sleep(5)", "the SuperNode's sleeps", (SUPERNODE, "time")),
        ("supernode", "time.sleep(3)", "time.sleep(3); time.time()", "sleeps", (SUPERNODE, "time")),
        (
            "supernode",
            "run_id = _pull_and",
            "x = _pull_and",
            "messages come",
            (SUPERNODE, "_pull_and_store_message"),
        ),
        ("server", "except ObjectUnavailableError as e:", "except E:", "got lost", (GRID, "pull_objects")),
        ("server", "flush_logs(log_queue)", "flush_logs(q)", "the log is flushed", (SERVERAPP, "flush_logs")),
        ("relay", 'return "disabled"', 'return "off"', "telemetry that is off", (TELEMETRY, "create_event")),
    ],
)
def test_changed_source_is_left_alone(role, old, new, fact, untouched, monkeypatch):
    before = getattr(*untouched)
    changed_source(monkeypatch, old, new)
    (warning,) = flower_fast.apply(role=role)
    assert fact in warning
    assert "keeps its own pace" in warning
    assert getattr(*untouched) is before
    assert OBJECTS.pull_objects.__kwdefaults__["initial_backoff"] == 0.05  # the others are applied


def test_changed_defaults_are_left_alone(monkeypatch):
    other = dict(OBJECTS.pull_objects.__kwdefaults__) | {"initial_backoff": 2}
    monkeypatch.setattr(OBJECTS.pull_objects, "__kwdefaults__", other)
    (warning,) = flower_fast.apply(role="relay")
    assert "retries" in warning
    assert OBJECTS.pull_objects.__kwdefaults__["initial_backoff"] == 2
    assert OBJECTS.pull_and_inflate_object_from_tree.__kwdefaults__["initial_backoff"] == 1


def test_changed_clock_and_vanished_names_are_left_alone(monkeypatch):
    monkeypatch.setattr(SUPERNODE, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delattr(OBJECTS, "pull_objects")
    warnings = flower_fast.apply(role="supernode")
    assert len(warnings) == 2
    assert "clock" in warnings[0]
    assert "AttributeError" in warnings[1]


def test_installed_app_replaces_the_bundle():
    installed = object()
    assert flower_fast.use_installed_app(installed) == []
    assert RELAY.install_from_fab(b"not even a bundle", skip_prompt=True) is None
    load = RELAY.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("evil/app", "1.0", "hash") is installed


@pytest.mark.parametrize(
    "old", ["install_from_fab(fab.content", "load_client_app_fn = get_load", "run.fab_id, run"]
)
def test_installed_app_is_refused_where_it_cannot_be_pinned(old, monkeypatch):
    before = RELAY.install_from_fab, RELAY.get_load_client_app_fn
    changed_source(monkeypatch, old, "something_else(")
    assert len(flower_fast.use_installed_app(object())) == 1
    assert (RELAY.install_from_fab, RELAY.get_load_client_app_fn) == before


def test_relay_reports_the_message_it_took(monkeypatch):
    message = types.SimpleNamespace(SerializeToString=lambda: b"metadata")
    stub = types.SimpleNamespace(PullMessages=lambda request: types.SimpleNamespace(messages_list=[message]))
    monkeypatch.setattr(RELAY, "ClientAppIoStub", lambda channel: stub)
    told = []
    assert flower_fast.watch_relay_messages(told.append) == []
    made = RELAY.ClientAppIoStub("channel")
    assert told == []
    assert made.PullMessages("request").messages_list == [message]
    assert told == [b"metadata"]


def test_interceptors_are_put_around_flowers_own(monkeypatch):
    made, watched = [], []
    signature = inspect.signature(CONNECTION.create_channel)

    def create_channel(**options):
        made.append(options)
        return "channel"

    create_channel.__signature__ = signature
    monkeypatch.setattr(CONNECTION, "create_channel", create_channel)
    assert flower_fast.add_fleet_interceptors("outer", "inner", watched.append) == []
    assert CONNECTION.create_channel(server_address="a:1", insecure=False, interceptors=["sign"]) == "channel"
    assert made == [{"server_address": "a:1", "insecure": False, "interceptors": ["outer", "sign", "inner"]}]
    assert watched == ["channel"]


def test_interceptors_are_left_out_of_another_connection(monkeypatch):
    before = CONNECTION.create_channel
    changed_source(monkeypatch, "interceptors=interceptors,", "")
    (warning,) = flower_fast.add_fleet_interceptors("outer", "inner", print)
    assert "the site's channel" in warning
    assert CONNECTION.create_channel is before
