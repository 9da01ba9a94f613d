"""Where wardround reaches into Flower: all of it, for one version, checked before it is touched.

Flower 1.32.1 is built for rounds of minutes; its fixed waits add five seconds to each. They are no
settings, so the processes of wardround replace them after looking whether they are still what was measured
(docs/runtime.md). Every replacement stands for itself: one that finds something else leaves it alone and
says so, and Flower then works at its own pace. Nothing here changes what travels.

| what | Flower | here | who waits |
| --- | --- | --- | --- |
| SuperNode asks for work | 3 s | 0.3 s; after idle minutes up to 3 s | a site between two messages |
| SuperNode looks for its app's reply | 0.5 s | 0.05 s | a site after its work |
| first retry of an object that is announced but not there yet | 1 s | 0.05 s | both ends, most messages |
| longest wait between two retries | 10 s | 0.5 s | both ends, large messages |
| ServerApp lets its log flow off | 1-3 s | 0.5 s | the end of a run |
| telemetry that is switched off | starts `file` | nothing | every start and end of a process |
| two missed heartbeats, after which a SuperNode is gone | 60 s | 30 s | a site whose SuperNode was killed |
| SuperNode after a message that got lost half-way | for ever | goes on | a site, until it is restarted |
| ServerApp for the rest of an answer whose sender is gone | 7200 s | 180 s without any of it | the round, all sites |
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import re
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

Role = Literal["supernode", "relay", "server"]

PINNED = "1.32.1"
IDLE_SECONDS = 0.3
REPLY_SECONDS = 0.05
RETRY_SECONDS = 0.05
RETRY_CAP_SECONDS = 0.5
LOG_FLUSH_SECONDS = 0.5
HEARTBEAT_SECONDS = 15
STALLED_SECONDS = 180.0
"""Two objects of 5 MiB travel at a time: a site that needs longer for them has less than 0.5 Mbit/s to itself."""
RETRIES = 20_000
"""Flower gives an object up after 500 tries or 7200 s; with short waits only the second limit may count."""

log = logging.getLogger("wardround.flower")


class _Stalled(Exception):
    """Nothing of an answer has come for too long."""


class _OtherThanMeasured(Exception):
    """Flower is not what this module was written for."""


def apply(*, role: Role) -> list[str]:
    """Shorten Flower's waits in this process; a second call changes nothing.

    Args:
        role: What this process is: the SuperNode, a relay (ClientApp), or the ServerApp.

    Returns:
        A warning for each wait that keeps Flower's own length, logged as well; empty if all were shortened.
    """
    patches: dict[str, tuple[Callable[[], None], ...]] = {
        "supernode": (_sleeps, _retries, _silence, _lost_messages, _heartbeats),
        "relay": (_retries, _silence),
        "server": (_retries, _silence, _log_flush, _stalled_answers),
    }
    return _run(patches[role])


def use_installed_app(client_app: Any) -> list[str]:
    """Make relays of this process run an installed ClientApp, whatever the coordinator's bundle says.

    The bundle is then neither unpacked nor imported.

    Args:
        client_app: A `flwr.clientapp.ClientApp`.

    Returns:
        Warnings; if there are any, the bundle would be used.
    """

    def pin() -> None:
        module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
        source = inspect.getsource(module.run_clientapp)
        _expect(
            source.count("install_from_fab(fab.content, skip_prompt=True)") == 1, "how a bundle is unpacked"
        )
        _expect(len(re.findall(r"\bget_load_client_app_fn\(", source)) == 1, "how an app is loaded")
        _expect(
            "load_client_app_fn(\n            run.fab_id, run.fab_version, fab.hash_str" in source,
            "how an app is called",
        )
        _set(module, "install_from_fab", _do_nothing)
        _set(module, "get_load_client_app_fn", lambda **_: lambda *_: client_app)

    return _run((pin,))


def watch_relay_messages(report: Callable[[bytes], None]) -> list[str]:
    """Have relays of this process report the message they took on, before they work on it.

    Args:
        report: Gets the message's metadata (serialized `flwr.proto.message_pb2.Message` without content).

    Returns:
        Warnings; if there are any, nothing is reported.
    """

    def watch() -> None:
        module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
        original = module.ClientAppIoStub
        source = inspect.getsource(module)
        _expect(source.count("stub = ClientAppIoStub(channel)") == 1, "how a relay connects")
        _expect(
            source.count("stub.PullMessages(PullAppMessagesRequest())") == 1, "how a relay takes a message"
        )

        def reporting(channel: Any) -> Any:
            stub = original(channel)
            pull = stub.PullMessages

            def pull_and_report(*args: Any, **options: Any) -> Any:
                response = pull(*args, **options)
                report(response.messages_list[0].SerializeToString())
                return response

            stub.PullMessages = pull_and_report
            return stub

        _set(module, "ClientAppIoStub", reporting)

    return _run((watch,))


def add_fleet_interceptors(outer: Any, inner: Any, watch: Callable[[Any], None]) -> list[str]:
    """Put two gRPC client interceptors around the others of the SuperNode's connection to its SuperLink.

    Args:
        outer: Sees a call first, before it is signed.
        inner: Sees it last, with all metadata.
        watch: Gets the channel once it is made.

    Returns:
        Warnings; if there are any, the connection has neither.
    """

    def add() -> None:
        module = importlib.import_module("flwr.client.grpc_rere_client.connection")
        original = module.create_channel
        names = ["server_address", "insecure", "root_certificates", "max_message_length", "interceptors"]
        _expect(list(inspect.signature(original).parameters) == names, "how a channel is made")
        source = inspect.getsource(module.grpc_request_response)
        _expect(
            source.count("create_channel(") == 1 and "interceptors=interceptors," in source,
            "the site's channel",
        )

        def create(*args: Any, interceptors: Any = None, **options: Any) -> Any:
            channel = original(*args, interceptors=[outer, *(interceptors or ()), inner], **options)
            watch(channel)
            return channel

        _set(module, "create_channel", create)

    return _run((add,))


class _QuickTime:
    """Stands for the `time` module in one module of Flower, with shorter sleeps.

    A site that has had no message for long asks less often: waiting costs a hundredth of the time waited,
    at most.
    """

    def __init__(self) -> None:
        self._busy = time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds == 0.5:  # only while a message is being worked on
            self._busy = time.monotonic()
            seconds = REPLY_SECONDS
        elif seconds == 3:
            seconds = idle_seconds(time.monotonic() - self._busy, IDLE_SECONDS, seconds)
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def idle_seconds(waited: float, shortest: float, longest: float) -> float:
    """Return how long to sleep before asking again: a hundredth of the time waited, within limits."""
    return min(max(waited / 100, shortest), longest)


def _sleeps() -> None:
    module = importlib.import_module("flwr.supernode.start_client_internal")
    if isinstance(module.time, _QuickTime):
        return
    _expect(module.time is time, "the SuperNode's clock")
    uses = re.findall(r"\btime\.(?!monotonic)(\w+\([^()]*\))", inspect.getsource(module))
    _expect(sorted(uses) == ["sleep(0.5)", "sleep(0.5)", "sleep(3)"], "the SuperNode's sleeps")
    _set(module, "time", _QuickTime())


def _retries() -> None:
    module = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    stock = {"initial_backoff": 1, "backoff_cap": 10, "max_tries_per_object": 500, "max_time": 7200}
    quick = stock | {
        "initial_backoff": RETRY_SECONDS,
        "backoff_cap": RETRY_CAP_SECONDS,
        "max_tries_per_object": RETRIES,
    }
    functions = (module.pull_objects, module.pull_and_inflate_object_from_tree)
    for function in functions:
        found = {name: (function.__kwdefaults__ or {}).get(name) for name in stock}
        _expect(found in (stock, quick), "the retries of objects that are not there yet")
    for function in functions:
        function.__kwdefaults__.update(quick)


def _log_flush() -> None:
    module = importlib.import_module("flwr.server.serverapp.app")
    original = module.flush_logs
    if getattr(original, "quick", False):
        return
    parameters = inspect.signature(original).parameters
    _expect(
        list(parameters) == ["log_queue", "timeout"] and parameters["timeout"].default == 3.0,
        "the log's flush",
    )
    _expect(inspect.getsource(module).count("flush_logs(log_queue)") == 1, "where the log is flushed")

    def flush(log_queue: Any) -> bool:
        return bool(original(log_queue, timeout=LOG_FLUSH_SECONDS))

    flush.quick = True  # type: ignore[attr-defined]
    _set(module, "flush_logs", flush)


def _silence() -> None:
    """Telemetry that is off still starts a thread and a subprocess to describe the machine to nobody."""
    module = importlib.import_module("flwr.supercore.telemetry")
    if module.FLWR_TELEMETRY_ENABLED == "1" or module.create_event is _nothing_to_tell:
        return
    _expect('return "disabled"' in inspect.getsource(module.create_event), "telemetry that is off")
    _expect(
        "create_event(event_type, event_details)" in inspect.getsource(module.event), "how telemetry is made"
    )
    _set(module, "create_event", _nothing_to_tell)


def _heartbeats() -> None:
    """A SuperNode that was killed counts as present for two intervals, and is not let in again before."""
    connection = importlib.import_module("flwr.client.grpc_rere_client.connection")
    heartbeat = importlib.import_module("flwr.supercore.heartbeat")
    for module in (connection, heartbeat):
        _expect(module.HEARTBEAT_DEFAULT_INTERVAL in (30, HEARTBEAT_SECONDS), "the SuperNode's heartbeat")
    for module in (connection, heartbeat):
        _set(module, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_SECONDS)


def _lost_messages() -> None:
    """A SuperNode drops a message whose objects it cannot fetch (its run was stopped), then waits for its reply."""
    module = importlib.import_module("flwr.supernode.start_client_internal")
    original = module._pull_and_store_message
    if getattr(original, "quick", False):
        return
    source = inspect.getsource(module.start_client_internal)
    _expect(
        source.count("run_id = _pull_and_store_message(\n                state=state,") == 1,
        "how messages come",
    )
    _expect("state.delete_messages(" in inspect.getsource(original), "what happens to a lost message")

    def pull(**options: Any) -> Any:
        run_id = original(**options)
        return run_id if getattr(options["state"], "msg_store", True) else None

    pull.quick = True  # type: ignore[attr-defined]
    _set(module, "_pull_and_store_message", pull)


def _stalled_answers() -> None:
    """An answer is announced before its objects come; if its sender dies between, the ServerApp waits for them.

    It looks after no other answer meanwhile. Given up, an answer is one that got lost on the way; so is one whose objects
    the SuperLink does not know any more, which would end the run.
    """
    module = importlib.import_module("flwr.superlink.grid.grpc_grid")
    original = module.pull_objects
    if getattr(original, "quick", False):
        return
    source = inspect.getsource(module.GrpcGrid.pull_messages)
    _expect(source.count("pull_objects(") == 1, "how an answer is fetched")
    _expect("except ObjectUnavailableError as e:" in source, "what becomes of an answer that got lost")
    objects = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    missing = objects.ObjectUnavailableError

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any) -> Any:
        last = time.monotonic()

        def fetch(object_id: str) -> bytes:
            nonlocal last
            try:
                content = pull_object_fn(object_id)
            except missing:
                if time.monotonic() - last > STALLED_SECONDS:
                    raise _Stalled(object_id) from None
                raise
            last = time.monotonic()
            return content

        try:
            return original(object_ids, fetch, **options)
        except (_Stalled, objects.ObjectIdNotPreregisteredError) as error:
            raise missing(str(error)) from error

    pull.quick = True  # type: ignore[attr-defined]
    _set(module, "pull_objects", pull)


def _run(patches: tuple[Callable[[], None], ...]) -> list[str]:
    warnings = []
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    if version != PINNED:
        warnings.append(
            f"Flower {version} is installed, wardround was measured with {PINNED}: Flower keeps its own pace."
        )
        patches = ()
    for patch in patches:
        try:
            patch()
        except _OtherThanMeasured as error:
            warnings.append(f"Flower {version} is not as measured ({error}): it keeps its own pace there.")
        except Exception as error:  # a changed module may fail in any way; Flower itself must still run
            warnings.append(
                f"Flower {version} is not as measured ({type(error).__name__}): it keeps its own pace there."
            )
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


def _expect(fact: bool, what: str) -> None:
    if not fact:
        raise _OtherThanMeasured(what)


def _set(module: ModuleType, name: str, value: Any) -> None:
    _expect(hasattr(module, name), name)
    setattr(module, name, value)


def _nothing_to_tell(*_: Any) -> str:
    return "disabled"


def _do_nothing(*_: Any, **__: Any) -> None:
    """Stands for the unpacking of a bundle."""
