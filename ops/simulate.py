"""`wardround simulate`: the same ServerApp and relay in Flower's simulation runtime, many sites on one machine.

One worker process serves all sites (each keeps its own folder, data and state); Flower's virtual SuperNodes run the
relay and find their site by partition number. What differs from a trial: no TLS, no keys, no separate processes per
hospital. Use it to explore methods; use `wardround trial` to see a deployment.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def simulate_run(out: Path, socket: Path, sites: int, *, cpus_per_relay: float = 0.5) -> None:
    """Run the apps in Flower's simulation runtime, in this process, until the ServerApp ends.

    Args:
        out: Run folder with its config.json.
        socket: Socket of the worker that serves all sites, in the configuration's order of sites.
        sites: How many sites.
        cpus_per_relay: What Ray reserves for one relay; bounds how many run at a time.
    """
    os.environ.update(
        {
            "WARDROUND_WORKER": str(socket),
            "WARDROUND_RUN_DIR": str(out),
            "WARDROUND_RUN_ID": out.name,
            "WARDROUND_RUNTIME": "stock",
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_TELEMETRY_ENABLED": "0",
        }
    )
    from flwr.simulation import run_simulation

    from client.relay import app as client_app
    from server.app import app as server_app

    logging.getLogger("flwr").setLevel(logging.WARNING)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=sites,
        backend_config={
            "client_resources": {"num_cpus": cpus_per_relay, "num_gpus": 0.0},
            "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR},
        },
    )


def main(argv: list[str]) -> int:
    """Run a simulation in a process of its own: `python -m ops.simulate RUN_FOLDER SOCKET SITES`."""
    out, socket, count = Path(argv[0]), Path(argv[1]), int(argv[2])
    simulate_run(out, socket, count)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
