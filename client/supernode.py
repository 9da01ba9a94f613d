"""Flower's SuperNode with shorter waits, a count of what its connection carries, and plain words when it is refused.

    python -m client.supernode [Flower's own options] [--wardround-site ALIAS] [--wardround-events FILE]

Everything else is `flower-supernode` itself: the same options, the same behaviour, the same log. If the installed
Flower is not the measured one, it runs as that Flower runs, with a warning and, where the count is not possible,
without one.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc

from client.transport import TransportCounter, TransportInterceptor
from common import flower_fast
from common.errors import VERDICT, CredentialError, ProcessError, WardroundError
from common.events import EventLog

TICK_SECONDS = 1.0
QUIET_SECONDS = 10.0
QUIET_BYTES = 16 * 1024
"""Less than this is idle asking: it is written every `QUIET_SECONDS` only, or a day of waiting fills the log."""

REACTIVATE_SECONDS = 90.0
REACTIVATE_PAUSE = 2.0
"""Flower counts a killed SuperNode as present until two heartbeats of 30 s are missed, and refuses its return so long."""

INTERRUPTED = 130
"""Exit code of a SuperNode that was interrupted, also by Flower itself."""

ACTIVATE = "/flwr.proto.Fleet/ActivateNode"


class Admission(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Watches the first call to the coordinator: waits where waiting helps, notes why it was refused.

    Args:
        site: Alias for the sentences.
        sleep: How to wait (seconds).
    """

    def __init__(self, site: str = "", sleep: Callable[[float], None] = time.sleep) -> None:
        self._who = f"Site {site}" if site else "This site"
        self._sleep = sleep
        self._waited = 0.0
        self.refusal: WardroundError | None = None

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        """Make the call, again if this SuperNode's predecessor still counts as present."""
        call = continuation(details, request)
        if details.method != ACTIVATE:
            return call
        while self._still_present(call) and self._waited < REACTIVATE_SECONDS:
            if not self._waited:
                _say(f"{self._who} still counts as connected, from a process that ended hard; asking again.")
            self._sleep(REACTIVATE_PAUSE)
            self._waited += REACTIVATE_PAUSE
            call = continuation(details, request)
        self.refusal = self._reason(call)
        return call

    @staticmethod
    def _still_present(call: Any) -> bool:
        return call.code() == grpc.StatusCode.FAILED_PRECONDITION and "could not be activated" in str(
            call.details()
        )

    def _reason(self, call: Any) -> WardroundError | None:
        code, text = call.code(), str(call.details())
        if code == grpc.StatusCode.OK:
            return None
        if code == grpc.StatusCode.UNAVAILABLE:
            if "handshake" not in text.lower():
                return None  # not there yet: Flower asks again by itself
            if "not yet valid" in text.lower() or "has expired" in text.lower():
                return CredentialError(
                    f"{self._who}: the coordinator's certificate is not valid at the time of this machine's clock. Set the "
                    "clock; if it is right, ask the coordinator for a new certificate.",
                    detail=text,
                )
            return CredentialError(
                f"{self._who}: the coordinator's certificate was not signed by the authority given here, or is for "
                "another name. Ask the coordinator for its authority's certificate and its host name.",
                detail=text,
            )
        if code == grpc.StatusCode.UNAUTHENTICATED and "timestamp" in text.lower():
            return CredentialError(
                f"{self._who}: the coordinator refuses the time in the signature. This machine's clock is off by minutes or "
                "more: set it.", detail=text,
            )  # fmt: skip
        if code == grpc.StatusCode.UNAUTHENTICATED:
            return CredentialError(
                f"{self._who}: the coordinator refuses the signature. Set this machine's clock, and check that the "
                "private key is the one whose public half was registered.",
                detail=text,
            )
        if self._still_present(call):
            return ProcessError(
                f"{self._who} is connected already: end its other SuperNode first.", detail=text
            )
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            return CredentialError(
                f"{self._who}: the coordinator does not know this key. Send it the public key, to be registered.",
                detail=text,
            )
        return ProcessError(f"{self._who}: the coordinator answered {code.name}.", detail=text)


class Reporter:
    """Writes the count as cumulative `transport` events, at most one a second, from a thread of its own.

    Args:
        counter: The count.
        log: Where the events go.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, counter: TransportCounter, log: EventLog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counter = counter
        self._log = log
        self._clock = clock
        self._written = (0, 0, 0)
        self._when = clock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="transport")

    def start(self) -> None:
        """Start writing; the last event is written when the interpreter ends."""
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left to write, once."""
        if not self._end.is_set():
            self._end.set()
            self.write(final=True)
            self._log.close()

    def write(self, *, final: bool = False) -> None:
        """Write an event if enough has changed since the last."""
        now = self._counter.snapshot()
        news = now[0] + now[1] - self._written[0] - self._written[1]
        if news and (final or news >= QUIET_BYTES or self._clock() - self._when >= QUIET_SECONDS):
            self._log.emit("transport", down=now[0], up=now[1], calls=now[2])
            self._written, self._when = now, self._clock()

    def _watch(self) -> None:
        while not self._end.wait(TICK_SECONDS):
            self.write()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the SuperNode from the command line, and end the process once Flower has left it.

    It never waits for threads or for the interpreter to tear itself down: a SuperNode that Flower interrupts while it
    disconnects (a coordinator that forgot its sites) was seen to hang there for ever, alive for what supervises it.
    """
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # Flower interrupts itself when the coordinator does not know the node any more
        _say("interrupted")
        code = INTERRUPTED
    except SystemExit as end:
        if isinstance(end.code, str):
            _say(end.code)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where the log cannot be written
        os._exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run Flower's SuperNode with what is ours; return the exit code of a coordinator's refusal, else 0."""
    parser = argparse.ArgumentParser(prog="python -m client.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--wardround-site", default="")
    parser.add_argument("--wardround-events", type=Path, default=None)
    ours, flowers = parser.parse_known_args(arguments)
    counter, admission = TransportCounter(), Admission(ours.wardround_site)
    warnings = flower_fast.apply(role="supernode")
    warnings += flower_fast.add_fleet_interceptors(admission, TransportInterceptor(counter), counter.watch)
    for warning in warnings:
        _say(f"warning: {warning}")
    reporter: Reporter | None = None
    if ours.wardround_events is not None:
        log = EventLog(ours.wardround_events, "supernode", site=ours.wardround_site)
        reporter = Reporter(counter, log)
        reporter.start()
    from flwr.supernode.cli import flower_supernode

    sys.argv = ["flower-supernode", *flowers]
    try:
        flower_supernode()
    except (
        RuntimeError,
        grpc.RpcError,
        SystemExit,
    ):  # Flower logs why, or does not, and falls over its own generator
        if admission.refusal is None:
            raise
    finally:
        if reporter is not None:
            reporter.stop()
    if admission.refusal is None:
        return 0
    _say(f"detail: {admission.refusal.detail}")
    print(f"{VERDICT}{admission.refusal}", file=sys.stderr, flush=True)  # noqa: T201 what a supervisor may quote
    return admission.refusal.exit_code


def _say(text: str) -> None:
    print(f"supernode: {text}", file=sys.stderr, flush=True)  # noqa: T201 stderr is this process's log


if __name__ == "__main__":
    main()
