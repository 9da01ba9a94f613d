"""An in-process federation: real sites, real round loop, every message through wire bytes; no Flower, no socket.

Sites are tables written to disk, the model is a logistic regression: a round takes milliseconds, so the conformance
suite can run every method through every fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.site import Site
from client.site_config import Policy, SiteConfig
from client.worker import failure
from common.config import RunConfig
from common.events import EventLog, read_events
from common.frames import Parts, from_frames, to_frames
from common.methods import get_method
from common.models import build_model
from common.payload import Tensors
from common.versions import versions_of
from common.wire import PING, read_header
from server.link import Answer
from server.loop import RoundLoop
from server.strategy import MethodStrategy

FEATURES = ("a", "b", "c")
Tamper = Callable[[str, int, Parts], Parts | None]


def write_table_site(folder: Path, *, seed: int, rows: int = 24, shift: float = 0.0) -> Path:
    """Write one site's table: three features, a noisy linear target, 2/3 training rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)) + shift
    y = (x @ np.array([1.0, -2.0, 0.5]) - shift + rng.normal(scale=0.5, size=rows) > 0).astype(int)
    y[:4] = [0, 1, 0, 1]
    split = ["training", "training", "validation", "test"]
    lines = ["a,b,c,target,split"] + [
        f"{row[0]:.6f},{row[1]:.6f},{row[2]:.6f},{label},{split[index % 4]}"
        for index, (row, label) in enumerate(zip(x, y, strict=True))
    ]
    folder.mkdir(parents=True)
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    description = {
        "name": "tiny", "task": "tabular", "table": "table.csv", "features": list(FEATURES), "target": "target",
        "split_column": "split", "labels": {"0": "well", "1": "ill"},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def table_config(
    method: str = "fedavg", *, rounds: int = 3, seed: int = 7, sites: tuple[str, ...] = (), **params: object
) -> RunConfig:
    """Return a run over the tables with a logistic regression and plain SGD.

    Its network is all head: methods that keep the head keep the bias instead, so that something is left to share.
    """
    if method in ("fedper", "fedrep"):
        params.setdefault("personal", ["*.bias"])
    return RunConfig.from_mapping(
        {
            "method": method, "params": params, "seed": seed, "sites": sites,
            "data": {"task": "tabular", "spatial_dims": 0, "channels": FEATURES, "labels": ("well", "ill"), "patch": ()},
            "train": {"batch_size": 5, "lr": 0.1, "optimizer": "sgd", "momentum": 0.0, "local_epochs": 2},
            "rounds": {"rounds": rounds, "deadline": 60.0, "poll": 0.001, "retry_wait": 0.001, "ready_timeout": 60.0, "quorum": 0.5},
        }
    )  # fmt: skip


def versions_for(config: RunConfig) -> dict[str, str]:
    """Return what a coordinator of this software says it runs."""
    network = build_model(config.model, config.data, seed=config.seed)
    return versions_of(config, get_method(config.method), network.state_dict())


def phase_of(parts: Parts) -> int:
    """Return what a message is for."""
    return read_header(parts).phase


SILENT: Parts = {}


@dataclass
class MemoryLink:
    """A link that hands messages to sites in this process, as bytes.

    Attributes:
        sites: Sites by alias.
        tamper: May change a site's answer (alias, round, parts), lose it with an error of the transport (None), or
            let the site stay silent (`SILENT`).
        backwards: Deliver answers in reverse order of asking.
    """

    sites: dict[str, Site]
    tamper: Tamper = lambda alias, round_, parts: parts
    backwards: bool = False
    seen: list[tuple[str, int, Parts, Parts]] = field(default_factory=list)
    _asked: dict[str, tuple[str, int, Parts]] = field(default_factory=dict)
    _count: int = 0

    def nodes(self) -> list[int]:
        return list(range(1, len(self.sites) + 1))

    def ask(self, node: int, parts: Parts, *, phase: int, round: int, ttl: float) -> str:
        self._count += 1
        self._asked[f"t{self._count}"] = (list(self.sites)[node - 1], round, from_frames(to_frames(parts)))
        return f"t{self._count}"

    def poll(self, tickets: Iterable[str]) -> list[Answer]:
        """Let one site work and return its answer."""
        order = [ticket for ticket in tickets if ticket in self._asked]
        if not order:
            return []
        ticket = order[-1] if self.backwards else order[0]
        alias, round_, parts = self._asked.pop(ticket)
        try:
            site = self.sites[alias]
            answer = site.ping(parts) if phase_of(parts) == PING else site.handle(parts, lambda: None)
        except Exception as error:
            answer = failure(error, alias)
        self.seen.append((alias, round_, parts, answer))
        changed = self.tamper(alias, round_, from_frames(to_frames(answer)))
        if changed is SILENT:
            return []
        return [Answer(ticket, changed, error="" if changed is not None else "the site is gone")]


class Federation:
    """Sites on disk under one root, and runs over them."""

    def __init__(
        self,
        root: Path,
        aliases: tuple[str, ...] = ("alpha", "beta", "gamma"),
        *,
        policy: Policy | None = None,
    ) -> None:
        self.root = root
        self.aliases = aliases
        self.policy = policy or Policy()
        self._open: dict[str, dict[str, Site]] = {}
        for index, alias in enumerate(aliases):
            if not (root / "data" / alias).exists():
                write_table_site(root / "data" / alias, seed=index, rows=24 + 8 * index, shift=0.3 * index)

    def open_sites(self, home: str = "home") -> dict[str, Site]:
        """Return fresh sites (as after a restart) whose state lies under `home`."""
        for site in self._open.pop(home, {}).values():
            site.close()
        sites = {}
        for alias in self.aliases:
            folder = self.root / home / alias
            folder.mkdir(parents=True, exist_ok=True)
            config = SiteConfig.model_validate(
                {"alias": alias, "data": self.root / "data" / alias, "socket": "/none", "home": folder, "policy": self.policy,
                 "compute": {"device": "cpu", "threads": 1}}
            )  # fmt: skip
            sites[alias] = Site(config, EventLog(folder / "events.jsonl", "worker", site=alias))
        self._open[home] = sites
        return sites

    def start(
        self, config: RunConfig, *, home: str = "home", run: str = "run", link: MemoryLink | None = None
    ) -> RoundLoop:
        """Return a loop whose roster is complete."""
        config = config.model_copy(update={"sites": self.aliases})
        folder = self.root / f"{home}-server"
        strategy = MethodStrategy(config=config, run=run, folder=folder)
        self.link = link or MemoryLink(self.open_sites(home))
        return strategy.prepare(self.link)

    def run(self, config: RunConfig, *, home: str = "home", **options: object) -> RoundLoop:
        """Run to the end and return the loop."""
        loop = self.start(config, home=home, **options)  # type: ignore[arg-type]
        loop.execute()
        return loop

    def personal(self, home: str = "home") -> dict[str, Tensors]:
        """Return the personal models that the sites saved, by alias."""
        from safetensors.torch import load_file

        found = {}
        for alias in self.aliases:
            path = self.root / home / alias / "models" / f"personal-{alias}.safetensors"
            if path.is_file():
                found[alias] = load_file(path)
        return found

    def events(self, home: str = "home") -> list[dict]:
        """Return the server's events."""
        return list(read_events(self.root / f"{home}-server" / "events.jsonl"))
