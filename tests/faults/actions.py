"""The faults of the matrix, and how each is proven to have struck.

A fault takes (run, site, draw, typical, outcome): it breaks the run at a moment drawn from `draw`, notes the moment in
`outcome.at`, and returns the exit code of the last command. A proof takes (run, site, outcome, typical) and asserts.
"""

import json
import subprocess
import time

from tests.faults import tools
from tests.faults.outcome import NAMED
from tests.faults.tools import WARDROUND

LAST = 5  # the last round in which a fault may strike: one more follows it
END_SECONDS = 300.0
FREE_SECONDS = 3.0
SITE_STATE = "sites/{site}/state/{run}/round-{number:06d}"


def strike(find, what):
    """Return a fault that kills the process that `find` gives, at a random moment of a random round."""

    def fault(run, site, draw, typical, outcome):
        outcome.notes["round"] = run.moment(draw, 1, LAST, typical)
        outcome.at.append(run.kill(lambda: find(run, site), what))
        return run.end(END_SECONDS)

    return fault


kill_worker = strike(lambda run, site: run.process(f"worker-{site}"), "the worker")
kill_relay = strike(lambda run, site: run.relay(site), "a relay")
kill_launcher = strike(lambda run, site: run.process(f"relay-{site}"), "the relay's launcher")
kill_supernode = strike(lambda run, site: run.process(f"supernode-{site}"), "the SuperNode")
kill_server_app = strike(lambda run, site: run.server_app(), "the ServerApp")
kill_superexec = strike(lambda run, site: run.process("serverapp"), "the ServerApp's launcher")
kill_superlink = strike(lambda run, site: run.process("superlink"), "the SuperLink")


def kill_worker_at_start(run, site, draw, typical, outcome):
    """Kill a worker while the federation is still starting."""
    run.until(lambda: run.process(f"worker-{site}"), "the worker is started")
    time.sleep(draw.uniform(0.0, 4.0))
    outcome.at.append(run.kill(lambda: run.process(f"worker-{site}"), "the worker"))
    return run.end(END_SECONDS)


def kill_machine(run, site, draw, typical, outcome):
    """Kill everything at once, then continue the run."""
    outcome.notes["round"] = run.moment(draw, 2, LAST, typical)
    outcome.at.append(run.kill_machine())
    run.resume()
    return run.end(END_SECONDS)


def kill_command_thrice(run, site, draw, typical, outcome):
    """Kill the operator's command three times, each time in a later round, and continue at once."""
    for first in (1, 3, 5):
        run.moment(draw, first, first + 1, typical)
        outcome.at.append(run.kill_command())
        run.resume()
    return run.end(END_SECONDS)


def resume_twice(run, site, draw, typical, outcome):
    """Try to continue a run that another command is running: refused by name, and the run is not touched."""
    run.moment(draw, 2, 4, typical)
    outcome.at.append(time.time())
    second = subprocess.run(
        [WARDROUND, "resume", str(run.out)], capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode in NAMED.values(), second.stderr
    assert any(f"({code})" in second.stderr for code in NAMED), second.stderr
    return run.end(END_SECONDS)


def fill_disk(run, site, draw, typical, outcome):
    """Fill the site's volume inside a round, and free it some seconds after the site has said so."""
    outcome.notes["round"] = run.moment(draw, 2, 4, typical)
    worker = run.until(lambda: run.process(f"worker-{site}"), "the worker runs")
    tools.disk_full(worker)
    outcome.at.append(time.time())
    run.until(lambda: told_of(run, site, outcome.at[0]), "the full disk is noticed", 60.0)
    time.sleep(FREE_SECONDS)
    tools.disk_free(worker)
    return run.end(END_SECONDS)


def told_of(run, site, since):
    """Return what was said of a site's trouble since a moment."""
    said = [*run.named("site.retry"), *run.told("process.restart")]
    return [
        item
        for item in said
        if item["t"] >= since and site in (item.get("site"), item.get("name", "")[-len(site) :])
    ]


def cutting(seconds, *, hold=False):
    """Return a fault that cuts the site's cable inside a round."""

    def fault(run, site, draw, typical, outcome):
        outcome.notes["round"] = run.moment(draw, 1, LAST, typical)
        outcome.at.append(run.cut(site, seconds, hold=hold))
        code = run.end(END_SECONDS + seconds)
        over = run.control / f"cut-{site}.over"
        outcome.notes["dropped"] = json.loads(over.read_text())["dropped"] if over.is_file() else None
        return code

    return fault


stall_20 = cutting(20.0, hold=True)
cut_20 = cutting(20.0)
cut_120 = cutting(120.0)


def slow_site(run, site, draw, typical, outcome):
    """Give a worker a tenth of its time from a round on."""
    outcome.notes["round"] = run.moment(draw, 3, 4, typical)
    outcome.at.append(time.time())
    with tools.slow_down(run.until(lambda: run.process(f"worker-{site}"), "the worker runs"), 10):
        return run.end(END_SECONDS)


def stop_inside_round(run, site, draw, outcome):
    """Kill the machine in a round that one site has saved already and another has not; returns the checkpoints."""
    number = outcome.notes["round"] = draw.randint(3, LAST)
    other = next(folder.name for folder in sorted((run.out / "sites").iterdir()) if folder.name != site)
    run.until(lambda: run.begun(number), f"round {number} begins")
    run.until(lambda: run.process(f"worker-{site}"), "the worker runs").suspend()
    saved = run.out / SITE_STATE.format(site=other, run=run.out.name, number=number)
    run.until(saved.is_dir, f"{other} has saved round {number}", 60.0)
    outcome.at.append(run.kill_machine())
    found = tools.checkpoints(run.out)
    assert [folder.name for folder in found] == [f"round-{n:06d}" for n in (number - 2, number - 1)]
    return found


def corrupt_newest(run, site, draw, typical, outcome):
    """Kill the machine, alter the newest checkpoint, continue: from the one before."""
    run.until(lambda: run.begun(1), "round 1 begins")
    tools.corrupt(stop_inside_round(run, site, draw, outcome)[-1], outcome.seed)
    run.resume()
    outcome.at.append(time.time())
    return run.end(END_SECONDS)


def corrupt_all(run, site, draw, typical, outcome):
    """Kill the machine, alter every checkpoint, continue: refused."""
    run.until(lambda: run.begun(1), "round 1 begins")
    for checkpoint in stop_inside_round(run, site, draw, outcome):
        tools.corrupt(checkpoint, outcome.seed)
    run.resume()
    outcome.at.append(time.time())
    return run.end(END_SECONDS)


def wrong_clock(run, site, draw, typical, outcome):
    """The clock of one site is wrong from the beginning."""
    outcome.at.append(time.time())
    return run.end(END_SECONDS)


def lose_worker(run, site, draw, typical, outcome):
    """A worker dies in a round, and again whenever it is started."""
    outcome.notes["round"] = run.moment(draw, 2, 4, typical)
    return lose(run, site, outcome)


def lose_worker_at_once(run, site, draw, typical, outcome):
    """A worker dies for good at the beginning of the first round: its site never contributes."""
    run.until(lambda: run.begun(1), "round 1 begins")
    return lose(run, site, outcome)


def lose(run, site, outcome):
    """Kill a worker now and whenever it is started."""
    outcome.at.append(time.time())
    over = run.keep_killing(f"worker-{site}")
    try:
        return run.end(END_SECONDS)
    finally:
        over.set()


# proofs --------------------------------------------------------------------------------------------------------


def restarted(kind):
    """Return a proof that the supervisor started a process again, and named it."""

    def proof(run, site, outcome, typical):
        names = [item["name"] for item in run.told("process.restart")]
        assert any(name in (kind, f"{kind}-{site}") for name in names), (
            f"{kind} is not among the restarted: {names}"
        )

    return proof


def asked_again(run, site, outcome, typical):
    """The site was asked again, by a repetition within the round."""
    assert [item for item in run.named("site.retry") if item["site"] == site], (
        "the site was never asked again"
    )


def resumed(run, site, outcome, typical):
    """Every continuation began at the newest checkpoint: no round that was kept is done twice."""
    items = run.events()
    places = [place for place, item in enumerate(items) if item["event"] == "run.resume" and item["attempt"]]
    assert len(places) >= len(outcome.at), "the run was not continued"
    for place in places:
        kept = max((item["round"] for item in items[:place] if item["event"] == "checkpoint"), default=0)
        # The blow may fall between a checkpoint and the event that tells of it.
        assert items[place]["round"] in (kept, kept + 1), (
            f"went on after round {items[place]['round']}, kept was {kept}"
        )


def resumed_alone(run, site, outcome, typical):
    """Each continuation had the run folder to itself.

    The ServerApp of a killed command may live on for seconds; it must be gone before the next one begins, and its end
    must not be taken for the end of the next.
    """
    resumed(run, site, outcome, typical)
    works = False
    for item in run.events():
        if item["event"] == "run.start":
            works = True
        elif item["event"] == "run.end":
            assert works, f"a ServerApp ended that was thought gone: {item}"
            works = False
        elif item["event"] in ("round.start", "round.end", "checkpoint"):
            assert works, f"work after the ServerApp's end: {item}"
    assert not run.told("process.restart"), "the end of a former ServerApp was taken for the new one's"


def only_link_restarted(run, site, outcome, typical):
    """A SuperLink that keeps its messages in a file comes back with them: nothing else is started again."""
    assert list(run.out.glob("superlink.db*")), "the SuperLink kept no file"
    assert {item["name"] for item in run.told("process.restart")} == {"superlink"}, run.told(
        "process.restart"
    )
    assert not [item for item in run.named("run.resume") if item["attempt"]], "the ServerApp began again"


def stalled(run, site, outcome, typical):
    """The cable held a round up, and nothing was lost."""
    assert max(item["seconds"] for item in run.named("round.end")) > 15.0
    assert outcome.notes["dropped"] == 0


def lost_bytes(run, site, outcome, typical):
    """The cable really lost something."""
    assert outcome.notes["dropped"] or outcome.verdict, "the cut dropped nothing"


def only_slow(run, site, outcome, typical):
    """The site was slow, and slow was no reason to restart it or to do without it."""
    ends = run.named("round.end")
    assert max(item["seconds"] for item in ends) > 3 * typical, "the site was not slowed down"
    assert not run.told("process.restart"), "a slow worker was taken for a dead one"
    assert not [item for item in ends if item["missing"]]


def fell_back(run, site, outcome, typical):
    """The newest checkpoint was refused and the one before it used."""
    number = outcome.notes["round"]
    assert [item["round"] for item in run.named("checkpoint.refused")] == [number - 1]
    assert run.named("run.resume")[-1]["round"] == number - 2


def names_the_clock(run, site, outcome, typical):
    """A run that does not end well says that it was the clock, and whose."""
    said = f"{outcome.verdict} {run.stderr()}".lower()
    assert not outcome.verdict or ("clock" in said and site in said), said


def names_the_site(run, site, outcome, typical):
    """The verdict names the site that was lost."""
    assert site in outcome.verdict, outcome.verdict


def reported_missing(run, site, outcome, typical):
    """Every round went on without the site, and the report says who was missing and why."""
    ends = run.named("round.end")
    assert all(item["missing"] == [site] for item in ends), [item["missing"] for item in ends]
    report = (run.out / "report.html").read_text()
    assert "No hospital was missing in any round" not in report
    absences = report[report.index("Who was missing, and why") :]
    assert site in absences
