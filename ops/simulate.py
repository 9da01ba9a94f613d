"""`wardround simulate`: the same ServerApp and relay in Flower's simulation runtime, many sites on one machine.

One worker process serves all sites (each keeps its own folder, data and state); Flower's virtual SuperNodes run the
relay and find their site by partition number. What differs from a trial: no TLS, no keys, no separate processes per
hospital. Use it to explore methods; use `wardround trial` to see a deployment.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ops.plan import Plan


def run_simulation_of(plan: Plan, socket: Path, *, cpus_per_relay: float = 0.5) -> None:
    """Run a plan in Flower's simulation runtime, in this process, until its ServerApp ends.

    Args:
        plan: The plan; its config.json is written already.
        socket: Socket of the worker that serves all its sites, in the plan's order of sites.
        cpus_per_relay: What Ray reserves for one relay; bounds how many run at a time.

    Raises:
        WardroundError: The run failed; its sentence says why.
    """
    os.environ.update(
        {
            "WARDROUND_WORKER": str(socket),
            "WARDROUND_RUN_DIR": str(plan.out),
            "WARDROUND_RUN_ID": plan.out.name,
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
        num_supernodes=len(plan.sites),
        backend_config={
            "client_resources": {"num_cpus": cpus_per_relay, "num_gpus": 0.0},
            "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR},
        },
    )
