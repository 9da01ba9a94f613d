"""This machine's clock, as far as it can be judged without a time server."""

from __future__ import annotations

import datetime

from ops.kit import SLACK, KitList
from ops.preflight import Finding, fail, ok, warn
from ops.preflight_engine import CALL_SECONDS, Run, run_program

_MEND = "Set the clock: `timedatectl set-ntp true`, or the hospital's time server."
NOT_ASKED = "not checked against a time server"


def check_clock(
    about: KitList | None,
    begins: float | None,
    *,
    run: Run = run_program,
    now: datetime.datetime | None = None,
) -> Finding:
    """Hold the clock against dates that are known to be past, and say whether the system keeps it right.

    Args:
        about: The kit's list, if it could be read: it was made before now.
        begins: Start of the coordinator's certificate (seconds since the epoch), if it was seen.
        run: Runs timedatectl.
        now: The time; the clock's if none.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    reads = f"{moment:%Y-%m-%d %H:%M} UTC"
    past = [about.created - SLACK] if about else []
    if begins is not None:
        past.append(datetime.datetime.fromtimestamp(begins, datetime.UTC))
    if past and moment < max(past):
        found = f"The clock reads {reads}, which is before the kit or the coordinator's certificate was made."
        return fail("clock", found, _MEND)
    if about and moment > about.expires:
        found = f"The clock reads {reads}, which is after the kit's end."
        return fail("clock", found, "Set the clock if it is wrong; else ask the coordinator for a new kit.")
    asked = run(["timedatectl", "show", "--property=NTPSynchronized", "--value"], CALL_SECONDS)
    state = asked.out.strip() if asked.code == 0 else ""
    against = "the kit's dates and the coordinator's certificate" if begins is not None else "the kit's dates"
    fits = f"{reads} fits {against}" if past else reads
    if state == "yes":
        return ok("clock", f"{fits}; the system says that it is synchronised.")
    if state == "no":
        return warn("clock", f"{fits}, but the system says that it is not synchronised.", _MEND)
    return ok("clock", f"{fits}; {NOT_ASKED}.")
