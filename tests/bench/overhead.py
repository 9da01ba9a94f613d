"""Framework time per round, CPU and memory of each process, bytes against a TCP proxy: fast and stock runtime.

    .venv/bin/python -m tests.bench.overhead [--rounds 12] [--runtime fast|stock|both]

Three sites, TLS, site keys. Framework time of a round = its wall time - the slowest site's seconds in the worker; the
first two rounds warm up and are left out. An unloaded machine is assumed, and the load is written beside the figures.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.events import read_events
from ops.options import Options
from ops.trial import run_trial
from tests.bench.environment import tiny_data, write
from tests.e2e.proxy import CountingProxy

WARM = 2


def measure(data: Path, runtime: str, rounds: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Run one trial with a counting proxy before each site and return its figures."""
    out = Path(tempfile.mkdtemp(prefix="wr-bench-")) / "run"
    proxies: dict[str, CountingProxy] = {}
    with ExitStack() as stack:

        def through(site: str, address: str) -> str:
            host, port = address.rsplit(":", 1)
            proxies[site] = stack.enter_context(CountingProxy((host, int(port))))
            return f"127.0.0.1:{proxies[site].port}"

        options = Options("fedavg", str(data), rounds=rounds, out=out, settings=settings)
        code = run_trial(options, runtime=runtime, fleet=through)  # type: ignore[arg-type]
        if code:
            raise SystemExit(f"the trial failed with code {code}; its folder is {out}")
    server = list(read_events(out / "events.jsonl"))
    ends = [event for event in server if event["event"] == "round.end" and not event.get("closing")][WARM:]
    replies = [event for event in server if event["event"] == "site.reply" and event["round"] > WARM]
    memory: dict[str, float] = {}
    for file in out.glob("events*.jsonl"):
        for event in read_events(file):
            if event["event"] == "memory":
                memory[event["name"]] = max(memory.get(event["name"], 0.0), event["peak"])
    return {
        "runtime": runtime,
        "rounds": len(ends),
        "overhead_s": spread([event["overhead"] for event in ends]),
        "round_s": spread([event["seconds"] for event in ends]),
        "slowest_worker_s": spread([event["slowest"] for event in ends]),
        "relay_cpu_s": spread([event["relay"]["cpu_s"] for event in replies]),
        "relay_peak_mb": spread([event["relay"]["peak_mb"] for event in replies]),
        "peak_mb": {name: round(value, 1) for name, value in sorted(memory.items())},
        "bytes": {site: wire(out, server, site, proxy) for site, proxy in proxies.items()},
        "load_average": os.getloadavg(),
    }


def wire(out: Path, server: list[dict[str, Any]], site: str, proxy: CountingProxy) -> dict[str, Any]:
    """Return a site's bytes by kind, Flower's and TLS's own, and what the proxy counted."""
    kinds: dict[str, int] = {}
    for event in server:
        if event["event"] == "bytes" and event["site"] == site:
            for kind, count in event["kinds"].items():
                name = f"{event['direction']}/{kind}"
                kinds[name] = kinds.get(name, 0) + count
    row: dict[str, Any] = {"kinds": kinds, "proxy": proxy.down + proxy.up}
    counted = out / f"events-{site}-net.jsonl"
    if counted.is_file():
        last = [event for event in read_events(counted) if event["event"] == "transport"][-1]
        carried = last["down"] + last["up"]
        row["tls_and_flower"] = carried - sum(kinds.values())
        row["sum"] = carried
        row["sum_over_proxy"] = round(carried / row["proxy"], 4)
    return row


def spread(values: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


def main(argv: list[str]) -> None:
    """Measure and write build/bench/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--runtime", choices=("fast", "stock", "both"), default="both")
    arguments = parser.parse_args(argv)
    data = tiny_data(Path(tempfile.mkdtemp(prefix="wr-bench-")) / "tiny")
    settings = ("width=16", "levels=3", "patch=16,16,16", "patches_per_case=1")
    runtimes = ("fast", "stock") if arguments.runtime == "both" else (arguments.runtime,)
    figures = {runtime: measure(data, runtime, arguments.rounds, settings) for runtime in runtimes}
    print(write("overhead", figures))


if __name__ == "__main__":
    main(sys.argv[1:])
