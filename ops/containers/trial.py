"""The container that conducts a trial: submits the run, shows it, tends it, and ends with its verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from common.errors import WardroundError
from common.events import EventLog
from ops.containers import places
from ops.containers.register import control_client, public_keys
from ops.containers.superlink import tell
from ops.plan import Plan
from ops.remote import RemoteRun, coordinator_plan
from ops.tables import print_closing
from ops.trial import Conduct, conduct, finished, holding


def work_with(keys: Path) -> Callable[[Plan, EventLog, Callable[[], None]], dict[str, object]]:
    """Return the work of a trial whose processes are containers.

    Args:
        keys: Has the authority and the sites' public keys.
    """

    def work(plan: Plan, events: EventLog, refresh: Callable[[], None]) -> dict[str, object]:
        events.emit("trial.phase", phase="start")
        with control_client(keys) as control:
            known = public_keys(keys)
            run = RemoteRun(
                plan, control, {alias: known[alias] for alias in plan.sites}, events, idle=refresh
            )
            try:
                run.begin()
                events.emit("trial.phase", phase="run")
                return run.watch()
            except BaseException:
                run.stop()
                raise

    return work


def run(out: Path, keys: Path, console: Console) -> int:
    """Run what was prepared in a run folder; one that was interrupted goes on, one that is complete is shown.

    Returns:
        0 if the run ended well, else the exit code of what went wrong.

    Raises:
        ConfigError: Nothing was prepared there.
        ProcessError: Another command runs it.
    """
    plan = coordinator_plan(out)
    if finished(out):
        console.print("This run is complete. WARDROUND_RUN=NAME makes another one.")
        print_closing(out, console)
        return 0
    with holding(out):
        (out / "events.jsonl").touch()  # a run folder without events is taken for one that may be removed
        return conduct(Conduct(out, lambda events: plan, work_with(keys), console))


def main() -> int:
    """Conduct the trial that the environment names."""
    try:
        return run(places.RUNS / places.Variables().run(), places.KEYS, Console())
    except WardroundError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
