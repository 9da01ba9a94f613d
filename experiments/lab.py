"""Many federations in one process each: what the evidence scripts run their methods on.

The coordinator's loop, the sites, their borders and every message's bytes are the product's own; only Flower, the relay
and the sockets are left out, so that a core does nothing but train. The figures are those of the harness's run with the same
seed and settings (tests/common/test_experiment_lab.py), and were those of a trial over processes where one was compared (heart).

    jobs = [Job("vessels-fedavg-0", Path("vessels"), "fedavg", rounds=20, seed=0)]
    results = run_jobs(jobs, Path("results"), workers=2)

A job whose result lies in the folder already is not run again: a stopped study goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client.site import Site
from client.site_config import SiteConfig
from common.events import EventLog, read_events
from common.frames import Parts
from common.proto.wardround_pb2 import Phase
from common.wire import PING, read_header
from ops.options import Options
from ops.plan import Plan, make_plan, versions
from server.link import Answer
from server.strategy import MethodStrategy

console = Console()


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: Unique name, also of its file.
        data: Data root.
        method: Registered method.
        rounds: Rounds; None takes the data's own.
        seed: Seed of network, order and noise.
        settings: `key=value`, as behind `--set`.
        tags: What the run stands for in a table.
    """

    name: str
    data: Path
    method: str
    rounds: int | None = None
    seed: int = 0
    settings: tuple[str, ...] = ()
    tags: dict[str, Any] = field(default_factory=dict)


class DirectLink:
    """A link to sites in this process; a site works when its answer is asked for.

    Args:
        sites: Sites by alias.
    """

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites = sites
        self._asked: dict[str, tuple[str, Parts]] = {}
        self._count = 0

    def nodes(self) -> list[int]:
        """Return a number for every site."""
        return list(range(1, len(self.sites) + 1))

    def ask(self, node: int, parts: Parts, *, phase: Phase, round: int, ttl: float) -> str:
        """Take a message."""
        self._count += 1
        self._asked[ticket := str(self._count)] = (list(self.sites)[node - 1], parts)
        return ticket

    def poll(self, tickets: Iterable[str]) -> list[Answer]:
        """Let one site work. A failure ends the study: its figures would be of a subset."""
        ticket = next((ticket for ticket in tickets if ticket in self._asked), None)
        if ticket is None:
            return []
        alias, parts = self._asked.pop(ticket)
        site = self.sites[alias]
        answer = site.ping(parts) if read_header(parts).phase == PING else site.handle(parts, lambda: None)
        return [Answer(ticket, answer)]


def run_job(job: Job, out: Path, keep: Path | None = None) -> dict[str, Any]:
    """Run one job on one core and write its result.

    Args:
        job: The run.
        out: Folder of the results.
        keep: Folder that becomes the run's, with models, slices and events; by default nothing but the result is kept.

    Returns:
        name, tags, settings, primary; `validation`: by round and site; `test`: by site; `bytes`: by direction and site;
        `seconds` (processor time of the whole run); `phases`: wall seconds by site and phase.
    """
    import torch

    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="wr-lab-")) if keep is None else keep
    work.mkdir(parents=True, exist_ok=True)
    begun, processor = time.perf_counter(), time.process_time()
    try:
        options = Options(job.method, str(job.data), rounds=job.rounds, seed=job.seed, settings=job.settings)
        plan = make_plan(options, job.data, work, runtime="lab")
        _run(plan, work)
        found = {"name": job.name, **figures(work / "events.jsonl")}
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)
    described = {key: value for key, value in asdict(job).items() if key not in ("name", "data")}
    found |= {
        **described,
        "rounds": plan.config.rounds.rounds,
        "params": plan.config.params,
        "data": plan.federation.name,
        "seconds": round(time.process_time() - processor, 1),
        "wall_seconds": round(time.perf_counter() - begun, 1),
        "environment": versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{job.name}.part"
    partial.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    partial.replace(out / f"{job.name}.json")
    return found


def _run(plan: Plan, work: Path) -> None:
    """Run a plan in this process; its events lie in `work`."""
    sites: dict[str, Site] = {}
    try:
        for alias, folder in plan.sites.items():
            home = work / "sites" / alias
            home.mkdir(parents=True, exist_ok=True)
            config = SiteConfig.model_validate(
                {"alias": alias, "data": folder.resolve(), "socket": "/none", "home": home, "models": work / "models",
                 "compute": {"device": "cpu", "threads": 1}}
            )  # fmt: skip
            sites[alias] = Site(config, EventLog(home / "events.jsonl", "worker", site=alias))
        MethodStrategy(config=plan.config, run="lab", folder=work).prepare(DirectLink(sites)).execute()
    finally:
        for site in sites.values():
            site.close()


def figures(log: Path) -> dict[str, Any]:
    """Read a run's figures out of its events: each site's own model where it has one."""
    found: dict[str, Any] = {
        "primary": "",
        "validation": {},
        "test": {},
        "bytes": {"up": {}, "down": {}},
        "phases": {},
    }
    events = list(read_events(log))
    personal = {
        event["site"] for event in events if event["event"] == "metric" and event["model"] == "personal"
    }
    for event in events:
        site = event.get("site", "")
        if event["event"] == "metric" and (event["model"] == "personal") == (site in personal):
            found["primary"] = event["primary"]
            if event["split"] == "test":
                values = {name: round(value, 5) for name, value in event["values"].items()}
                found["test"][site] = {"cases": event["cases"], **values}
            else:
                row = found["validation"].setdefault(str(event["round"]), {})
                row[site] = round(event["values"][event["primary"]], 5)
        elif event["event"] == "bytes":
            sums = found["bytes"][event["direction"]]
            sums[site] = sums.get(site, 0) + event["total"]
        elif event["event"] == "site.reply":
            sums = found["phases"].setdefault(site, {})
            for phase, seconds in (event.get("phases") or {}).items():
                sums[phase] = round(sums.get(phase, 0.0) + seconds, 3)
    return found


def run_jobs(jobs: Sequence[Job], out: Path, *, workers: int = 0) -> dict[str, dict[str, Any]]:
    """Run those jobs that have no result yet, some at a time, with a progress bar; return all results by name.

    Raises:
        ValueError: A result of that name is of other settings.
        Exception: What ended a job; the others' results are kept, and the next call runs only what is missing.
    """
    done = read_results(out)
    for job in jobs:
        if job.name in done and not _is_of(done[job.name], job):
            raise ValueError(
                f"The result '{job.name}' is of other settings than the study's now. Remove it, or give another folder."
            )
    left = [job for job in jobs if job.name not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")  # threads and generators begin anew in every process
    with (
        Progress(*columns, console=console, transient=True) as bar,
        ProcessPoolExecutor(
            workers or os.cpu_count() or 1, mp_context=context, max_tasks_per_child=1
        ) as pool,
    ):
        task = bar.add_task("runs", total=len(jobs), completed=len(jobs) - len(left))
        waiting = {pool.submit(run_job, job, out): job for job in left}
        try:
            for future in as_completed(waiting):
                found = future.result()
                done[found["name"]] = found
                bar.advance(task)
                console.print(
                    f"{found['name']}: {overall(found):.4f}, {found['seconds']:.0f} s", highlight=False
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {job.name: done[job.name] for job in jobs}


def _is_of(found: dict[str, Any], job: Job) -> bool:
    same = (found["method"], found["seed"], tuple(found["settings"])) == (job.method, job.seed, job.settings)
    return same and job.rounds in (None, found["rounds"])


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the results that lie in a folder, by name."""
    return (
        {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
        if out.is_dir()
        else {}
    )


def overall(found: dict[str, Any]) -> float:
    """Return the primary figure over all test cases of all sites, every case weighed the same."""
    cases = sum(row["cases"] for row in found["test"].values())
    return float(sum(row[found["primary"]] * row["cases"] for row in found["test"].values()) / cases)


def validation(found: dict[str, Any], round_: int | None = None) -> float:
    """Return the mean over the sites of the primary figure on validation cases, after a round (the last one)."""
    rows = found["validation"]
    row = rows[str(max(map(int, rows)) if round_ is None else round_)]
    return float(sum(row.values()) / len(row))
