"""How a broken run ended: its bytes against those of a run nobody disturbed, its verdict, and one line for the table."""

import hashlib
import json
import time
from dataclasses import dataclass, field

from common.errors import WardroundError
from tests.bench.environment import ROOT, environment

OUT = ROOT / "build" / "faults"
RESULTS = OUT / "results.jsonl"
NAMED = {kind.code: kind.exit_code for kind in WardroundError.__subclasses__()}  # "internal" names nothing


def results_of(out):
    """Return SHA-256 by name of a run's models and of every site's last state."""
    files = {f"models/{path.name}": path for path in (out / "models").glob("*.safetensors")}
    for state in (out / "sites").glob(f"*/state/{out.name}"):
        last = max(state.glob("round-*"))
        files.update({f"{state.parts[-3]}/{last.name}/{path.name}": path for path in last.iterdir()})
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


@dataclass
class Outcome:
    """What is noted of one case.

    `outcome` is "ok" or "verdict"; or what must not be: "wrong" (other bytes), "unnamed" (a failure without a code),
    "hang", "unproven" (ended well, but the fault missed or something else was not right), "unfinished".
    `at` is the moment of each fault in seconds since the epoch.
    """

    case: str
    seed: int
    outcome: str = "unfinished"
    verdict: str = ""
    at: list = field(default_factory=list)
    notes: dict = field(default_factory=dict)

    def judge(self, run, code, expected):
        """Compare with the undisturbed run's digests; raises AssertionError if it ended wrong or without a name."""
        if code == 0:
            self.outcome, self.verdict = "wrong", ""
            found = results_of(run.out)
            assert found.keys() == expected.keys(), "the run left other files than the undisturbed one"
            differ = [name for name in expected if found[name] != expected[name]]
            assert not differ, f"the command ended well with other bytes: {differ}"
            self.outcome = "ok"
            return
        self.outcome = "unnamed"
        ends = [item for item in run.named("trial.end", "events-trial.jsonl") if item["t"] >= run.launched]
        assert ends, f"exit code {code} without a verdict\n{run.last_words()}"
        end = ends[-1]
        assert end["verdict"] == "failed", end
        self.verdict = f"{end.get('code', '')}: {end.get('message', '')}"
        assert end["code"] in NAMED, f"no named verdict: {end}"
        assert code == NAMED[end["code"]], f"exit code {code} is not that of '{end['code']}'"
        assert f"({end['code']})" in run.stderr(), "stderr does not say the code"
        self.outcome = "verdict"

    def record(self, run):
        """Append the case's line to build/faults/results.jsonl."""
        ends = [item["t"] for item in run.named("round.end")]
        back = [min((end - moment for end in ends if end >= moment), default=None) for moment in self.at]
        line = {
            "case": self.case, "seed": self.seed, "outcome": self.outcome, "verdict": self.verdict,
            "recovered_s": [None if seconds is None else round(seconds, 2) for seconds in back],
            "restarts": len(run.told("process.restart")), "retries": len(run.named("site.retry")),
            "resumes": len([item for item in run.named("run.resume") if item["attempt"]]),
            "rounds": len({item["round"] for item in run.named("round.end") if not item.get("closing")}),
            "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **self.notes,
        }  # fmt: skip
        OUT.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")


def write_environment():
    """Note beside the results what they were measured on."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
