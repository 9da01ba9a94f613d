"""The Flower ServerApp: read the configuration, run the method, tell how it ended.

The run folder comes from the environment of the coordinator's own process (`WARDROUND_RUN_DIR`), never from the run's
configuration, which travels to the sites. `flwr run . --run-config 'wardround="..."'` works as well as `wardround trial`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import common
from common import flower_fast
from common.config import RunConfig
from common.errors import ProcessError, WardroundError, safe_sentence
from common.events import EventLog
from server.checkpoint import Checkpoints
from server.link import FlowerLink
from server.strategy import MethodStrategy

log = logging.getLogger("wardround.server")
app = ServerApp()
ALONE_SECONDS = 60.0
PARENT_SECONDS = 0.5
ORPHANED = 9


def run_folder(run: str) -> Path:
    """Return this run's folder: the coordinator's environment decides, else `runs/RUN` under the working folder."""
    return Path(os.environ.get("WARDROUND_RUN_DIR") or Path("runs") / run)


def alone(folder: Path) -> int:
    """Wait until no other ServerApp works on a run folder, and keep others away; returns the handle that does.

    One whose launcher was killed lives on for a second or two; it must not write beside its successor.

    Raises:
        ProcessError: Another one is still at work after a while.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".serverapp.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    limit = time.monotonic() + ALONE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() > limit:
                os.close(handle)
                raise ProcessError(
                    f"Another ServerApp has worked on this run folder for {ALONE_SECONDS:.0f} s. End it, then resume the run."
                ) from error
            time.sleep(0.1)
        else:
            return handle


def end_with_parent() -> None:
    """End this process at once when what started it is gone.

    Flower looks for that, too, but ends in good order, and then waits for a SuperLink that may be gone as well: for
    minutes, in which its successor cannot begin.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def read_config(context: Context, folder: Path) -> RunConfig:
    """Return the run's configuration: Flower's run config, else the run folder's config.json, else the defaults.

    Raises:
        ConfigError: An unknown key or a bad value, named.
    """
    text = str(context.run_config.get("wardround", ""))
    saved = folder / "config.json"
    if not text.strip() and saved.is_file():
        text = json.dumps(json.loads(saved.read_text(encoding="utf-8")).get("config", {}))
    return RunConfig.from_json(text)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and end with a verdict; a run that failed ends as failed for Flower, too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if os.environ.get("WARDROUND_RUNTIME", "fast") == "fast":
        for warning in flower_fast.apply(role="server"):
            log.warning("%s", warning)
    end_with_parent()
    run = os.environ.get("WARDROUND_RUN_ID") or f"run-{context.run_id}"
    folder = run_folder(run)
    events = EventLog(folder / "events.jsonl", "server", run=run)
    started = time.monotonic()
    strategy: MethodStrategy | None = None
    flower_run = str(context.run_id)
    lock = -1
    try:
        lock = alone(folder)
        config = read_config(context, folder)
        strategy = MethodStrategy(config=config, run=run, folder=folder, events=events)
        size = sum(tensor.numel() * tensor.itemsize for tensor in strategy.network.values())
        events.emit(
            "run.start", method=config.method, task=config.data.task, rounds=config.rounds.rounds, seed=config.seed,
            parameters=strategy.parameters, bytes=size, software=common.__version__,
        )  # fmt: skip
        strategy.summary()
        # A site may still be working on a round of the attempt before, and answers when it is done with it.
        rounds = config.rounds
        again = Checkpoints(folder).begun()
        patience = max(rounds.ready_timeout, rounds.deadline) if again else rounds.ready_timeout
        loop = strategy.prepare(FlowerLink(grid), patience=patience)
        loop.resume()
        loop.execute()
    except BaseException as error:
        code, message = safe_sentence(error)
        events.emit(
            "run.end",
            verdict="failed",
            seconds=time.monotonic() - started,
            rounds=_done(strategy),
            code=code,
            message=message,
            flower_run=flower_run,
        )
        if isinstance(error, WardroundError):
            log.error("%s %s", error, error.detail)
        raise
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        events.emit("memory", name="serverapp", rss=peak, peak=peak)
        if lock >= 0:
            os.close(lock)
    events.emit(
        "run.end",
        verdict="ok",
        seconds=time.monotonic() - started,
        rounds=_done(strategy),
        flower_run=flower_run,
    )


def _done(strategy: MethodStrategy | None) -> int:
    return strategy.loop.done if strategy and strategy.loop else 0
