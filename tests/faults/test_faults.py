"""The fault matrix: a running federation is broken on purpose, again and again, and must end well or by name.

Well means: the command ends with 0, and the models and the sites' last states are those of a run that nobody disturbed,
to the bit. By name means: it ends in time with a code and a sentence. It never hangs and never gives other bytes.
Moments, rounds and victims are drawn from a seed (WARDROUND_FAULT_SEEDS=1,2,3 runs every case with each of them).
Every case appends its line to build/faults/results.jsonl; `python -m tests.faults.table` makes the table of them.
"""

import os
import statistics
from dataclasses import dataclass

import pytest

from tests.bench.environment import tiny_data
from tests.faults import actions, clock
from tests.faults.outcome import Outcome, results_of, write_environment
from tests.faults.tools import Ended, Hang, Run, chance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SEEDS = [int(text) for text in os.environ.get("WARDROUND_FAULT_SEEDS", "1").split(",")]
SITES = ("hospital-1", "hospital-2", "hospital-3")
NAME = "run"  # the run's identifier: a reference must have the same
ROUNDS = 6
SETTINGS = (
    "width=4", "levels=2", "patch=16,16,16", "patches_per_case=1", "hd95=never", "deadline=120", "retry_wait=0.5",
    "probe=5",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to break a run.

    Attributes:
        name: In test ids and the table.
        fault: Breaks the run and returns the command's exit code.
        faults: How often it strikes.
        allowed: The outcomes that are right: "ok", "verdict".
        codes: The verdicts that are right.
        quick: Part of `make e2e`, too.
        settings: More settings.
        rounds: How many.
        cable: The site's connection can be cut.
        clock: Seconds by which the site's clock is wrong.
        transport: Where the SuperLink keeps messages; none takes the default.
        proof: Looks whether the fault did what it was meant to do: (run, site, outcome, typical seconds of a round).
        reference: "whole", or "without" the third hospital.
    """

    name: str
    fault: object
    faults: int = 1
    allowed: tuple = ("ok",)
    codes: tuple = ()
    quick: bool = False
    settings: tuple = ()
    rounds: int = ROUNDS
    cable: bool = False
    clock: int = 0
    transport: str = ""
    proof: object = None
    reference: str = "whole"


EITHER = ("ok", "verdict")
CASES = (
    Case("worker", actions.kill_worker, quick=True, proof=actions.restarted("worker")),
    Case("worker at the start", actions.kill_worker_at_start, proof=actions.restarted("worker")),
    Case("relay", actions.kill_relay, proof=actions.asked_again),
    Case("relay launcher", actions.kill_launcher, proof=actions.restarted("relay")),
    Case("SuperNode", actions.kill_supernode, proof=actions.restarted("supernode")),
    Case("ServerApp", actions.kill_server_app, quick=True, proof=actions.resumed),
    Case("server superexec", actions.kill_superexec, proof=actions.restarted("serverapp")),
    Case("SuperLink", actions.kill_superlink, proof=actions.restarted("superlink")),
    Case(
        "SuperLink, messages in a file", actions.kill_superlink, transport="file", proof=actions.only_link_restarted
    ),
    Case("machine", actions.kill_machine, quick=True, proof=actions.resumed),
    Case("command, three times", actions.kill_command_thrice, faults=3, proof=actions.resumed_alone),
    Case("resume beside a running command", actions.resume_twice),
    Case("disk full for seconds", actions.fill_disk, proof=actions.asked_again),
    Case("network stalls 20 s", actions.stall_20, cable=True, proof=actions.stalled),
    Case("network cut 20 s", actions.cut_20, cable=True, proof=actions.lost_bytes),
    Case(
        "network cut 120 s", actions.cut_120, cable=True, proof=actions.lost_bytes, settings=("deadline=300",),
        allowed=EITHER, codes=("quorum", "process"),
    ),
    Case("site ten times slower", actions.slow_site, proof=actions.only_slow),
    Case("corrupt checkpoint", actions.corrupt_newest, faults=2, quick=True, proof=actions.fell_back),
    Case("both checkpoints corrupt", actions.corrupt_all, faults=2, allowed=("verdict",), codes=("payload",)),
    Case(
        "clock two hours ahead", actions.wrong_clock, clock=7200, allowed=EITHER, codes=("credential", "quorum", "process"),
        proof=actions.names_the_clock,
    ),
    Case(
        "clock two hours behind", actions.wrong_clock, clock=-7200, allowed=EITHER, codes=("credential", "quorum", "process"),
        proof=actions.names_the_clock,
    ),
    Case(
        "site lost, quorum all", actions.lose_worker, allowed=("verdict",), codes=("quorum", "process"),
        settings=("deadline=60",), proof=actions.names_the_site,
    ),
    Case(
        "site lost, quorum 0.6", actions.lose_worker_at_once, settings=("quorum=0.6", "retries=1"), rounds=3,
        proof=actions.reported_missing, reference="without",
    ),
)  # fmt: skip


def options(data, rounds=ROUNDS, settings=(), **more):
    """Return the options of a run whose rounds are long enough to be hit: about two seconds."""
    kept = {text.partition("=")[0]: text for text in (*SETTINGS, *settings)}
    return {
        "method": "ditto", "data": str(data), "rounds": rounds, "local_epochs": 100, "seed": 7,
        "settings": list(kept.values()), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    write_environment()
    return tiny_data(tmp_path_factory.mktemp("data") / "tiny")


def undisturbed(folder, chosen):
    with Run(folder / NAME) as run:
        run.start(chosen)
        assert run.end(240) == 0, run.last_words()
        ends = [item["seconds"] for item in run.named("round.end") if not item["closing"]]
        assert not run.told("process.restart")
        assert not run.named("site.retry")
        return results_of(run.out), statistics.median(ends)


@pytest.fixture(scope="module")
def references(data, tmp_path_factory):
    """Digests and seconds of a round by kind of reference, each run once and only if asked for."""
    made = {}

    def reference(kind):
        if kind not in made:
            more = {"sites": "2", "rounds": 3} if kind == "without" else {}
            made[kind] = undisturbed(tmp_path_factory.mktemp(kind), options(data, **more))
        return made[kind]

    return reference


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    def build():
        if clock.compiler() is None:
            pytest.skip("no C compiler on this machine: the wrong clock is a small C library")
        return clock.build(tmp_path_factory.mktemp("clock"))

    return build


def marked(case):
    marks = () if case.quick else (pytest.mark.faults,)
    return pytest.param(case, id=case.name.replace(",", "").replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_broken_run_ends_well_or_by_name(case, seed, data, references, library, tmp_path):
    expected, typical = references(case.reference)
    draw = chance(f"{case.name}/{seed}")
    site = SITES[-1] if case.reference == "without" else draw.choice(SITES)
    env = {}
    if case.clock:
        wrong = clock.variables(library(), case.clock)
        env = {f"{kind}-{site}": wrong for kind in ("supernode", "relay", "worker")}
    outcome = Outcome(case.name, seed, notes={"site": site})
    with Run(tmp_path / NAME) as run:
        try:
            chosen = options(data, case.rounds, case.settings)
            run.start(chosen, proxies=[site] if case.cable else (), env=env, transport=case.transport)
            code = struck(case, run, site, draw, typical, outcome)
            outcome.judge(run, code, expected)
            ended, outcome.outcome = outcome.outcome, "unproven"
            check(case, run, site, ended, outcome, typical)
            outcome.outcome = ended
        except Hang:
            outcome.outcome = "hang"
            raise
        finally:
            outcome.record(run)


def struck(case, run, site, draw, typical, outcome):
    """Break the run and return the exit code of the last command."""
    try:
        return case.fault(run, site, draw, typical, outcome)
    except Ended as ended:
        outcome.notes["ended"] = str(ended)
        return ended.code


def check(case, run, site, ended, outcome, typical):
    """A run that ended well proves nothing if the fault missed it."""
    said = f"{ended} {outcome.verdict}\n{run.last_words()}"
    assert ended in case.allowed, said
    assert len(outcome.at) == case.faults, (
        f"the fault struck {len(outcome.at)} times, {case.faults} were meant"
    )
    if ended == "verdict":
        assert outcome.verdict.partition(":")[0] in case.codes, said
    if case.proof is not None:
        case.proof(run, site, outcome, typical)
    left = run.left_behind()
    assert not left, f"processes left behind: {left}"
