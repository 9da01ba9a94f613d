"""Makes run folders with believable events: whole, cut, failed, killed and continued, with sites that were missing or
had to be asked again, on either runtime.

Not figures of any real run: curves that rise and level off, times and bytes of the size that a small trial has. Every
event is held against the schema (common/events.py) as it is made, and a seed gives the same bytes each time.

    python -m tests.ops.sample_events FOLDER      a folder to look at, with its report
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common.config import RunConfig
from common.errors import WardroundError
from common.events import EVENT_SCHEMA, EVENTS

START = 1_760_000_000.0
CLASSES = ("CSF", "grey matter", "white matter")
MODEL_BYTES = 1_412_364
HEADER = 9_873
BEST = {"CSF": 0.80, "grey matter": 0.86, "white matter": 0.89}


@dataclass
class Sample:
    """What to make.

    Attributes:
        method: "ditto" evaluates a personal model, too.
        absent: Sites that miss a round, with code and sentence: {(round, alias): (code, sentence)}.
        verdict: "ok", "failed" (quorum), or "" for a run that was cut after its last round.
        again: How often a site is asked again in a round: {(round, alias): repetitions}.
        joined: Rounds in which a site joins: {round: alias}.
        late: Answers that come too late, told in the next round: {(round, alias)}.
        interrupted: Attempts that end in a round, "killed" in its middle or "failed" for want of a quorum; each is
            followed by another attempt, which continues after the round before.
        refused: Rounds whose checkpoint cannot be read: the next attempt continues one round earlier.
        restarts: Processes that are started again: {round: (name, site, why)}.
    """

    method: str = "ditto"
    sites: tuple[str, ...] = ("hospital-1", "hospital-2", "hospital-3")
    rounds: int = 8
    runtime: str = "fast"
    seed: int = 0
    absent: dict[tuple[int, str], tuple[str, str]] | None = None
    verdict: str = "ok"
    stop_after: int | None = None
    again: dict[tuple[int, str], int] = field(default_factory=dict)
    joined: dict[int, str] = field(default_factory=dict)
    late: frozenset[tuple[int, str]] = frozenset()
    interrupted: tuple[tuple[int, str], ...] = ()
    refused: frozenset[int] = frozenset()
    restarts: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the folder and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        _Maker(self, folder).make()
        return folder


class _Maker:
    def __init__(self, sample: Sample, folder: Path) -> None:
        self.sample, self.folder = sample, folder
        self.random = random.Random(f"sample/{sample.seed}")
        self.now = self.began = START
        self.attempt = 0
        self.entries = 0
        self.carried: dict[str, list[int]] = {}
        self.lines: dict[str, list[str]] = {}
        self.training = {alias: 6 - index % 3 for index, alias in enumerate(sample.sites)}
        self.shift = {alias: 0.035 * (index % 3) for index, alias in enumerate(sample.sites)}
        self.models = ("global", "personal") if sample.method == "ditto" else ("global",)

    def emit(self, file: str, process: str, event: str, *, site: str = "", **fields: object) -> None:
        if event not in EVENTS or fields.keys() - EVENTS[event][1].keys():
            raise WardroundError(f"The sample does not fit the schema: {event} {sorted(fields)}.")
        line = {"v": EVENT_SCHEMA, "t": round(self.now, 4), "process": process, "event": event}
        line |= {"run": "sample"} if process in {"trial", "server"} else {}
        line |= {"site": site} if site else {}
        self.lines.setdefault(file, []).append(json.dumps(line | fields, separators=(",", ":")) + "\n")

    def trial(self, event: str, **fields: object) -> None:
        self.emit("events-trial.jsonl", "trial", event, **fields)  # type: ignore[arg-type]

    def server(self, event: str, **fields: object) -> None:
        self.emit("events.jsonl", "server", event, **fields)  # type: ignore[arg-type]

    def worker(self, alias: str, event: str, **fields: object) -> None:
        self.emit(f"events-{alias}.jsonl", "worker", event, site=alias, **fields)

    def make(self) -> None:
        sample = self.sample
        self._config()
        first = 1
        for broken, how in sample.interrupted:
            self._start(first - 1)
            for number in range(first, broken):
                self._round(number, closing=False)
            first = self._break(broken, how)
        self._start(first - 1)
        last = sample.stop_after or sample.rounds
        for number in range(first, last + 1):
            self._round(number, closing=False)
            if sample.verdict == "failed" and number == last:
                break
        if sample.verdict == "ok" and last == sample.rounds:
            self._round(sample.rounds + 1, closing=True)
        self._end()
        for name, lines in self.lines.items():
            (self.folder / name).write_text("".join(lines), encoding="utf-8")

    def _config(self) -> None:
        sample = self.sample
        params = {"lam": 0.1, "personal_epochs": 0} if sample.method == "ditto" else {}
        config = RunConfig.from_mapping(
            {
                "method": sample.method, "params": params, "seed": sample.seed, "sites": list(sample.sites),
                "data": {"labels": ["background", *CLASSES], "channels": ["T1"], "spacing": [2.0, 2.0, 2.0]},
                "rounds": {"rounds": sample.rounds, "quorum": 0.67},
            }
        )  # fmt: skip
        document = {
            "config": config.model_dump(mode="json"),
            "title": "Brain tissue in three simulated hospitals",
            "note": "The sites are simulated: real anatomy of one template brain, deformed per subject, seen by three "
            "invented scanners. Figures compare methods; they say nothing about patients.",
            "data_name": "mni152",
            "runtime": sample.runtime,
            "command": f"wardround trial --method {sample.method} --rounds {sample.rounds} --seed {sample.seed}",
            "software": {
                "wardround": "0.1.0",
                "python": "3.11",
                "flwr": "1.32.1",
                "torch": "2.13.0",
                "monai": "1.6.1",
            },
            "started": "2025-10-09T08:53:20Z",
        }
        (self.folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")

    def _break(self, number: int, how: str) -> int:
        """End an attempt in a round, and return the round with which the next one begins."""
        sample = self.sample
        if how == "killed":
            self.server("round.start", round=number, sites=list(sample.sites), closing=False)
            self._ask(number)
            self._answer(sample.sites[0], number, self.now, closing=False)
            self.now += 3_600.0
        else:
            self._round(number, closing=False, only=sample.sites[:1])
            trouble = {"code": "quorum", "message": f"Round {number}: 1 sites contributed, 3 are needed."}
            took = round(self.now - self.began, 3)
            self.server("run.end", verdict="failed", seconds=took - 9, rounds=number - 1, **trouble)
            self.trial("trial.end", verdict="failed", seconds=took, **trouble)
            self.now += 600.0
        self.attempt += 1
        return number - 1 if number - 1 in sample.refused else number

    def _start(self, resumed: int) -> None:
        sample = self.sample
        self.began = self.now
        self.carried = {alias: [3_954, 13_748, 21] for alias in sample.sites}
        for phase in ("data", "check"):
            self.trial("trial.phase", phase=phase)
            self.now += 0.4
        self.trial(
            "trial.start", method=sample.method, task="segmentation", data="mni152", sites=list(sample.sites),
            rounds=sample.rounds, runtime=sample.runtime,
        )  # fmt: skip
        self.trial("trial.phase", phase="start")
        names = ["superlink", "serverapp"]
        names += [f"{kind}-{alias}" for alias in sample.sites for kind in ("worker", "supernode", "relay")]
        for index, name in enumerate(names):
            alias = next((alias for alias in sample.sites if name.endswith(f"-{alias}")), "")
            self.trial("process.start", name=name, pid=4000 + index, site=alias)
            self.now += 0.08
        self.trial("trial.phase", phase="ready")
        for name in names:
            self.now += 0.3
            alias = next((alias for alias in sample.sites if name.endswith(f"-{alias}")), "")
            self.trial("process.ready", name=name, seconds=round(3 + self.random.random() * 4, 3), site=alias)
        self.trial("trial.phase", phase="run")
        self.server(
            "run.start", method=sample.method, task="segmentation", rounds=sample.rounds, seed=sample.seed,
            parameters=MODEL_BYTES // 4, bytes=MODEL_BYTES, software="0.1.0",
        )  # fmt: skip
        for alias in sample.sites:
            self.worker(alias, "phase", round=0, phase="load")
            self.now += 0.6
            cases = {"training": self.training[alias], "validation": 2, "test": 2}
            self.server(
                "site.ready", site=alias, cases=cases, device="cpu", software="0.1.0", check={"errors": 0}
            )
            self.worker(alias, "phase", round=0, phase="idle")
        if self.attempt and resumed + 1 in sample.refused:
            sentence = f"The checkpoint of round {resumed + 1} is not whole."
            self.server("checkpoint.refused", round=resumed + 1, code="payload", message=sentence)
        if self.attempt and resumed:
            self.server("run.resume", round=resumed, attempt=self.attempt)

    def _round(self, number: int, *, closing: bool, only: tuple[str, ...] = ()) -> None:
        sample, began = self.sample, self.now
        if number in sample.joined:
            alias = sample.joined[number]
            self.server("site.joined", site=alias, round=number, cases=self.training[alias])
        self.server("round.start", round=number, sites=list(sample.sites), closing=closing)
        asked = self._ask(number)
        if number in sample.restarts and not self.attempt:
            name, alias, why = sample.restarts[number]
            self.trial("process.exit", name=name, site=alias, code=-9, expected=False)
            self.trial("process.restart", name=name, site=alias, why=why, attempt=1, seconds=1.0)
            self.trial("process.start", name=name, site=alias, pid=5_000 + number)
            self.trial("process.ready", name=name, site=alias, seconds=1.4)
        absent = dict(sample.absent or {})
        if only:
            gone = {alias for alias in sample.sites if alias not in only}
            absent |= {(number, alias): ("transport", f"{alias}: could not be reached.") for alias in gone}
        replied: dict[str, int] = {}
        locals_: dict[str, float] = {}
        losses: dict[str, float] = {}
        missing = []
        for alias in sample.sites:
            if (number - 1, alias) in sample.late:
                self.server("site.late", site=alias, round=number - 1, seconds=61.5)
            reason = absent.get((number, alias))
            if reason:
                self.server("site.failed", site=alias, round=number, code=reason[0], message=reason[1])
                missing.append(alias)
                continue
            locals_[alias], losses[alias] = self._answer(alias, number, asked, closing=closing)
            replied[alias] = self.training[alias]
        self.now = asked + max(locals_.values(), default=1.0) + 0.45 + 0.25 * self.random.random()
        took, slowest = self.now - began, max(locals_.values(), default=0.0)
        total = sum(replied.values())
        mean = sum(losses[a] * n for a, n in replied.items()) / max(total, 1)
        ending = {} if closing or not total else {"loss": round(mean, 6)}
        self.server(
            "round.end", round=number, seconds=round(took, 4), slowest=round(slowest, 4), overhead=round(took - slowest, 4),
            sites=list(replied), missing=missing, cases=replied, closing=closing, **ending,
        )  # fmt: skip
        lost = bool(only) or (sample.verdict == "failed" and number == sample.stop_after)
        if not closing and not lost:
            self.server("checkpoint", round=number, seconds=0.02, bytes=MODEL_BYTES + 12_000)

    def _ask(self, number: int) -> float:
        """Ask every site, some of them again, and return when they had been asked."""
        for alias in self.sample.sites:
            for attempt in range(self.sample.again.get((number, alias), 0) + 1):
                if attempt:
                    self.now += 0.5
                    sentence = f"{alias}: its SuperNode did not take the message."
                    self.server(
                        "site.retry", site=alias, round=number, code="transport", message=sentence, attempt=attempt,
                        seconds=0.5,
                    )  # fmt: skip
                self.now += 0.01
                self.server("site.asked", site=alias, round=number)
                self._bytes(alias, number, "down", {"header": HEADER, "config": 902, "model": MODEL_BYTES})
        return self.now

    def _answer(self, alias: str, number: int, asked: float, *, closing: bool) -> tuple[float, float]:
        """Let a site answer, and return its seconds and its loss."""
        phases = self._phases(alias, closing)
        local = sum(phases.values())
        self.now = asked + local + 0.2 + 0.05 * self.sample.sites.index(alias)
        self._steps(alias, number, asked, phases, closing)
        loss = 0.28 + 1.1 * math.exp(-number / 2.6) + 0.6 * self.shift[alias] + 0.02 * self.random.random()
        kinds = {"header": HEADER + 96, "metrics": 412} | ({} if closing else {"model": MODEL_BYTES})
        self._bytes(alias, number, "up", kinds)
        self.entries += 7
        head = hashlib.sha256(f"{alias}/{self.entries}".encode()).hexdigest()
        reply = {} if closing else {"loss": round(loss, 6)}
        self.server(
            "site.reply", site=alias, round=number, seconds=round(self.now - asked, 4), local=round(local, 4),
            phases=phases, relay={"cpu_s": 0.031, "peak_mb": 57.4}, cases=self.training[alias],
            ledger=f"{self.entries}:{head}", **reply,
        )  # fmt: skip
        self._figures(alias, number - 1, "validation", hd95=closing)
        if closing:
            self._figures(alias, number - 1, "test", hd95=True)
            if "personal" in self.models:
                name = f"personal-{alias}.safetensors"
                self.worker(alias, "model.saved", name=name, bytes=MODEL_BYTES + 9_000, round=number - 1)
            self.worker(alias, "slices.saved", round=number - 1, count=4)
        return local, loss

    def _phases(self, alias: str, closing: bool) -> dict[str, float]:
        speed = 1.0 + 0.25 * self.sample.sites.index(alias) + 0.1 * self.random.random()
        phases = {"decode": 0.004, "evaluate": (2.1 if closing else 0.52) * speed, "save": 0.06}
        if not closing:
            phases["train"] = 2.9 * speed * len(self.models)
        return {name: round(value, 4) for name, value in phases.items()}

    def _steps(self, alias: str, number: int, asked: float, phases: dict[str, float], closing: bool) -> None:
        ended, self.now = self.now, asked
        self.worker(alias, "phase", round=number, phase="evaluate")
        self.now += phases["evaluate"]
        for branch in () if closing else ("personal", "train")[-len(self.models) :]:
            for step in range(1, 4):
                self.now += phases["train"] / 3 / len(self.models)
                self.worker(alias, "phase", phase=branch, step=step, steps=3)
        self.now = ended
        self.worker(alias, "phase", round=number, phase="idle")
        self.worker(
            alias,
            "memory",
            name="worker",
            rss=700.0,
            peak=round(780 + 20 * self.random.random(), 2),
            round=number,
        )

    def _figures(self, alias: str, number: int, split: str, *, hd95: bool) -> None:
        for model in self.models:
            rise = 1 - math.exp(-number / (2.4 if model == "global" else 1.9))
            personal = 0.0 if model == "global" else 0.012 + 0.6 * self.shift[alias]
            values: dict[str, float] = {}
            for name, best in BEST.items():
                dice = (
                    0.04 + (best - self.shift[alias] + personal - 0.04) * rise + self.random.gauss(0, 0.006)
                )
                values[f"dice/{name}"] = round(min(max(dice, 0.0), 1.0), 6)
                values[f"iou/{name}"] = round(dice / (2 - dice), 6)
                if hd95:
                    values[f"hd95/{name}"] = round(
                        2.0 + 14 * (1 - dice) * (1 + 0.1 * self.random.random()), 6
                    )
            for base in ("dice", "iou", "hd95") if hd95 else ("dice", "iou"):
                values[base] = round(sum(values[f"{base}/{name}"] for name in CLASSES) / len(CLASSES), 6)
            values["loss"] = round(0.1 + 1.4 * (1 - values["dice"]), 6)
            self.server(
                "metric", site=alias, round=number, split=split, model=model, cases=2, values=values, primary="dice"
            )  # fmt: skip

    def _bytes(self, alias: str, number: int, direction: str, kinds: dict[str, int]) -> None:
        total = sum(kinds.values())
        self.server("bytes", site=alias, round=number, direction=direction, kinds=kinds, total=total)
        place = 0 if direction == "down" else 1
        self.carried[alias][place] += round(total * 1.003) + 6_200
        self.carried[alias][1 - place] += 2_100
        self.carried[alias][2] += 17
        if self.sample.runtime == "fast":
            down, up, calls = self.carried[alias]
            file = f"events-{alias}-net.jsonl"
            self.emit(file, "supernode", "transport", site=alias, down=down, up=up, calls=calls)

    def _end(self) -> None:
        sample = self.sample
        peaks = {"superlink": 118.4, "serverapp": 688.2}
        for alias in sample.sites:
            peaks |= {f"worker-{alias}": 790.0, f"supernode-{alias}": 114.6, f"relay-{alias}": 189.3}
        for name, peak in peaks.items():
            self.trial("memory", name=name, rss=peak - 3, peak=round(peak + self.random.random(), 2))
        done = sample.stop_after or sample.rounds
        if not sample.verdict:
            return
        trouble: dict[str, str] = {}
        if sample.verdict == "failed":
            done -= 1
            trouble = {"code": "quorum", "message": f"Round {done + 1}: 1 sites contributed, 3 are needed."}
        else:
            self.server(
                "model.saved", name="global.safetensors", bytes=MODEL_BYTES + 8_000, round=sample.rounds
            )
        seconds = round(self.now - self.began, 3)
        self.server("run.end", verdict=sample.verdict, seconds=seconds - 9, rounds=done, **trouble)
        self.trial("trial.phase", phase="stop")
        for name in peaks:
            self.trial("process.exit", name=name, code=0, expected=True)
        self.now += 2.4
        self.trial("trial.end", verdict=sample.verdict, seconds=round(self.now - self.began, 3), **trouble)


def eventful() -> Sample:
    """Return a sample in which much goes wrong, and which ends well: sites missing, asked again, late, a kill."""
    gone = ("worker", "hospital-2: the worker is not there; start it at the hospital.")
    slow = ("deadline", "hospital-3: did not answer within the round's deadline of 60 s.")
    return Sample(
        rounds=12, absent={**{(number, "hospital-2"): gone for number in (2, 3, 4)}, (9, "hospital-3"): slow},
        again={(2, "hospital-2"): 3, (7, "hospital-1"): 1}, joined={5: "hospital-2"}, late=frozenset({(9, "hospital-3")}),
        interrupted=((6, "killed"), (8, "failed")), refused=frozenset({5}),
        restarts={3: ("worker-hospital-2", "hospital-2", "exited")},
    )  # fmt: skip


if __name__ == "__main__":
    from ops.report import write_report

    print(write_report(eventful().write(Path(sys.argv[1]))))
