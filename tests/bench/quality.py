"""Federated against centralised and local-only training on the same budget, as real trials over processes.

    .venv/bin/python -m tests.bench.quality NAME DATA_ROOT [--methods fedavg,ditto,local-only] [--rounds 10] [--set k=v]

"centralised" pools the sites' cases into one folder and trains there alone, for the same number of epochs over the data
(rounds x local epochs); it is possible with public data only. Every figure is of the test cases, after the last round, of
each site's own model (personal where the method is personal); the mean over all test cases weighs every case the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.events import read_events
from common.federation import FEDERATION_FILE, find_sites
from ops.options import Options
from ops.trial import run_trial
from tests.bench.environment import write

CENTRALISED = "centralised"


def pool(root: Path, out: Path) -> Path:
    """Write a data root with one site that holds all cases of all sites, each in the split it had."""
    pooled: dict[str, Any] = {}
    rows: list[str] = []
    for alias, folder in find_sites(root).items():
        description = json.loads((folder / "dataset.json").read_text())
        if "table" in description:
            lines = (folder / description["table"]).read_text().splitlines()
            rows += lines if not rows else lines[1:]
            pooled = pooled or description
            continue
        shutil.copytree(folder, out / "pooled" / alias)
        pooled = pooled or {**description, "training": [], "validation": [], "test": []}
        for split in ("training", "validation", "test"):
            pooled[split] += [placed(entry, alias) for entry in description[split]]
    (out / "pooled").mkdir(parents=True, exist_ok=True)
    if rows:
        (out / "pooled" / pooled["table"]).write_text("\n".join(rows) + "\n")
    (out / "pooled" / "dataset.json").write_text(json.dumps(pooled))
    shutil.copy(root / FEDERATION_FILE, out / FEDERATION_FILE)
    return out


def placed(entry: dict[str, Any], alias: str) -> dict[str, Any]:
    """Return a dataset.json entry whose files lie one folder deeper and whose group is the site's own."""
    moved = dict(entry)
    for key in ("image", "label"):
        value = entry.get(key)
        if isinstance(value, str):
            moved[key] = f"{alias}/{value.removeprefix('./')}"
        elif isinstance(value, list):
            moved[key] = [f"{alias}/{part.removeprefix('./')}" for part in value]
    if "group" in entry:
        moved["group"] = f"{alias}/{entry['group']}"
    return moved


def figures(out: Path) -> dict[str, Any]:
    """Return the test figures of a run: by site, and over all test cases."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for event in read_events(out / "events.jsonl"):
        if event["event"] == "metric" and event["split"] == "test":
            last[event["site"], event["model"]] = event
    sites: dict[str, Any] = {}
    for (site, model), event in sorted(last.items()):
        if model == "personal" or (site, "personal") not in last:
            values = {name: round(value, 4) for name, value in event["values"].items()}
            sites[site] = {"model": model, "cases": event["cases"], "primary": event["primary"], **values}
    primary = next(iter(sites.values()))["primary"]
    cases = sum(row["cases"] for row in sites.values())
    mean = sum(row[primary] * row["cases"] for row in sites.values()) / cases
    ends = [event for event in read_events(out / "events.jsonl") if event["event"] == "round.end"]
    return {
        "primary": primary, "mean_over_cases": round(mean, 4), "cases": cases, "sites": sites,
        "seconds": round(sum(event["seconds"] for event in ends), 1),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Run and write build/bench/quality-NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", default="fedavg,ditto,local-only,centralised")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="wr-quality-"))
    found: dict[str, Any] = {
        "data": arguments.name,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "settings": arguments.settings,
    }
    for method in arguments.methods.split(","):
        centralised = method == CENTRALISED
        root = pool(arguments.data, work / "data") if centralised else arguments.data
        options = Options(
            "local-only" if centralised else method, str(root), rounds=arguments.rounds, seed=arguments.seed,
            out=work / method, settings=arguments.settings,
        )  # fmt: skip
        if code := run_trial(options, device=arguments.device):
            raise SystemExit(code)
        found[method] = figures(work / method)
        print(write(f"quality-{arguments.name}", found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
