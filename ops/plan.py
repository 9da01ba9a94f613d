"""From what the operator typed to a plan that can be run: data, sites, configuration, run folder.

Settings come from four places, later ones win: defaults, the data root's federation.json, the command's own options,
`--set key=value`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from client.site_config import read_site_config
from common.config import RunConfig
from common.errors import ConfigError, DataError, StorageError, nearest
from common.federation import FEDERATION_FILE, Federation, find_sites, read_federation, read_federation_file
from common.method import Method, RoundContext, make_halves
from common.methods import get_method
from common.models import build_model, parameter_groups
from common.store import write_bytes
from common.tasks import get_task
from ops.flower_commands import Transport
from ops.options import DEFAULT, Options

LOCK_FILE = ".lock"
DEFAULT_SITES = 3
DEFAULT_SUBJECTS = 10


@dataclass
class Plan:
    """A run that can be started.

    Attributes:
        config: The run's configuration, sites included.
        method: The method.
        federation: What the data root says of itself.
        sites: Data folder by alias, in the fixed order of the sites.
        out: The run folder.
        runtime: "fast", "stock" or "simulation".
        device: Where workers compute.
        threads: CPU threads per worker; 0 shares the cores.
        transport: Where the SuperLink keeps messages: "memory" or "file".
        command: The command line that repeats it.
        notes: What else goes into config.json.
    """

    config: RunConfig
    method: Method
    federation: Federation
    sites: dict[str, Path]
    out: Path
    runtime: str = "fast"
    device: str = "auto"
    threads: int = 0
    transport: Transport = "memory"
    command: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write config.json into the run folder."""
        document = {
            "config": self.config.model_dump(mode="json"),
            "title": self.federation.title or self.federation.name,
            "note": self.federation.note,
            "data_name": self.federation.name,
            "runtime": self.runtime,
            "device": self.device,
            "threads": self.threads,
            "transport": self.transport,
            "command": self.command,
            "software": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.notes,
        }
        write_bytes(self.out / "config.json", json.dumps(document, indent=2).encode())


def make_plan(options: Options, root: Path, out: Path, *, runtime: str) -> Plan:
    """Turn options into a plan over a data root.

    Args:
        options: What was typed.
        root: Data root (for the default data: where it was written).
        out: Run folder.
        runtime: What it will run on.

    Raises:
        ConfigError: Unknown method, key or site, a value out of its range, a task that is not the data's.
        DataError: The data root cannot be used.
    """
    get_method(options.method)  # a misspelt method is told before a data root is read
    federation = read_federation(root)
    sites = choose_sites(find_sites(root), options.sites)
    config, method = configure(options, federation, list(sites))
    return Plan(config, method, federation, sites, out, runtime)


def make_run_plan(options: Options, federation: Path, sites: Sequence[str], out: Path) -> Plan:
    """Turn options into a plan of a coordinator that has no data and knows no site's folder.

    Args:
        options: What was typed; `sites` and `data` are not looked at.
        federation: A `federation.json`, which says what every site's data must look like.
        sites: Aliases, in the fixed order of the sites.
        out: Run folder.

    Raises:
        ConfigError: Unknown method or key, a value out of its range, or a file that does not describe the data.
        DataError: The file is missing or is no federation.json.
    """
    get_method(options.method)
    if federation.is_dir():
        federation = federation / FEDERATION_FILE
    if not federation.is_file():
        raise DataError(
            "--federation names no file: expected a federation.json, which says what every site's data must look like "
            "(docs/data.md). Give its path.", detail=str(federation),
        )  # fmt: skip
    described = read_federation_file(federation)
    if "data" not in described.settings:  # a data root could be looked at; here is none
        raise ConfigError(
            "federation.json has no 'data': expected at least its task, channels and labels, since there is no data here "
            "to read them from. Add them (docs/data.md).", detail=str(federation),
        )  # fmt: skip
    config, method = configure(options, described, sites)
    return Plan(config, method, described, dict.fromkeys(sites, Path()), out)


def configure(options: Options, federation: Federation, sites: Sequence[str]) -> tuple[RunConfig, Method]:
    """Return a run's configuration and method; needs no data.

    Args:
        options: What was typed.
        federation: What is known of the data.
        sites: Aliases, in the fixed order of the sites.

    Raises:
        ConfigError: Unknown method or key, a value out of its range, a task that is not the data's, or what cannot be built.
    """
    method = get_method(options.method)
    document = RunConfig.from_mapping({**federation.settings, "method": method.name}).model_dump(mode="json")
    if federation.settings.get("method") != method.name:
        document["params"] = {}
    document["seed"] = options.seed
    document["sites"] = list(sites)
    if options.rounds is not None:
        document["rounds"]["rounds"] = options.rounds
    if options.local_epochs is not None:
        document["train"]["local_epochs"] = options.local_epochs
    config = RunConfig.from_mapping(document).with_settings(parse_settings(options.settings), method.params)
    if config.method != method.name:
        raise ConfigError(
            f"--set method={config.method}: the method is chosen by --method, which says '{method.name}'."
        )
    params = method.parse(config.params)
    config = config.model_copy(update={"params": params.model_dump(mode="json")})
    if options.task is not None and options.task != config.data.task:
        raise ConfigError(
            f"The data is for task '{config.data.task}', '--task {options.task}' was asked. Leave --task out, or give other data."
        )
    # what cannot be built is refused before anything starts
    network = build_model(config.model, config.data, seed=config.seed)
    context = RoundContext("", 0, config.rounds.rounds, config.seed)
    make_halves(method, config)[0].init(dict(network.state_dict()), parameter_groups(network), context)
    get_task(config.data, config.train)
    return config, method


def read_plan(out: Path) -> Plan:
    """Return the plan of a run folder, to continue it.

    Raises:
        ConfigError: No run folder, or one whose run never began.
    """
    try:
        document = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config = RunConfig.from_mapping(document["config"])
        files = {alias: out / "sites" / alias / "site.toml" for alias in config.sites}
        sites = {alias: read_site_config(file).data for alias, file in files.items()}
        plan = Plan(
            config, get_method(config.method),
            Federation(name=document["data_name"], title=document["title"], note=document["note"]), sites, out,
            runtime=document["runtime"], device=document["device"], threads=document["threads"],
            transport=document["transport"], command=document["command"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "This is no run folder that can be continued: expected one with config.json and a sites folder, as "
            "`wardround trial` makes it. Give the folder that it named.", detail=f"{out}: {error}",
        ) from error  # fmt: skip
    return plan


def choose_sites(found: dict[str, Path], wanted: str | None) -> dict[str, Path]:
    """Return the sites that take part: all, the first N, or those named.

    Raises:
        ConfigError: An unknown alias, or more sites than there are.
    """
    if wanted is None:
        return found
    if wanted.isdecimal():
        count = int(wanted)
        if not 1 <= count <= len(found):
            raise ConfigError(f"--sites {count}: the data has {len(found)} sites. Give 1 to {len(found)}.")
        return dict(list(found.items())[:count])
    chosen = {}
    for alias in (part.strip() for part in wanted.split(",")):
        if alias not in found:
            raise ConfigError(f"--sites: the data has no site '{alias}'. {nearest(alias, found)}")
        chosen[alias] = found[alias]
    return chosen


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split `key=value` texts.

    Raises:
        ConfigError: A text without an equals sign.
    """
    pairs = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set '{text}' is not key=value. Example: --set lr=0.001")
        pairs[key.strip()] = value.strip()
    return pairs


def default_root(options: Options) -> Path:
    """Return where the default data of these options lies or will lie: written once, used again."""
    count = int(options.sites) if options.sites and options.sites.isdecimal() else DEFAULT_SITES
    return Path("data") / f"mni152-{count}x{DEFAULT_SUBJECTS}-seed{options.seed}"


def data_root(options: Options) -> Path:
    """Return the data root that the options mean.

    Raises:
        DataError: Given and not there.
    """
    if options.data == DEFAULT:
        return default_root(options)
    root = Path(options.data)
    if not root.is_dir():
        raise DataError(
            "--data names no folder. Give a data root (one folder per site), or leave it out for the default data; "
            "`wardround data import --help` makes one from public data.", detail=str(root),
        )  # fmt: skip
    return root


def has_default(root: Path) -> bool:
    """Return True if the default data was written already."""
    return (root / FEDERATION_FILE).is_file()


def new_run_folder(options: Options) -> Path:
    """Return the run folder and make it.

    Raises:
        ConfigError: It holds another run already.
        StorageError: It cannot be made.
    """
    out = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.method}"
    try:
        if out.exists() and not out.is_dir():
            raise ConfigError("--out names a file. Choose a folder.", detail=str(out))
        if out.exists() and any(item.name != LOCK_FILE for item in out.iterdir()):
            raise ConfigError(
                "The run folder is not empty; a run never overwrites another. Choose another --out.",
                detail=str(out),
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The run folder cannot be made ({error.strerror or 'unknown reason'}): give the folder above it to the user that "
            "runs this (a container's user is 10001: `sudo chown 10001 FOLDER`).", detail=str(error),
        ) from error  # fmt: skip
    return out.resolve()


def versions() -> dict[str, str]:
    """Return the versions that matter to a result."""
    found = {"wardround": common.__version__, "python": platform.python_version()}
    for name in ("flwr", "torch", "monai", "numpy", "grpcio"):
        found[name] = importlib.metadata.version(name)
    return found
