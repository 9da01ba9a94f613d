"""The Docker engine of a hospital's machine: there, recent enough, with the images, memory, space and GPU that are needed.

The engine is asked by the docker command, because compose has no library of its own; what it says in its own words goes
to the local terminal alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import MismatchError, ProcessError, StorageError
from ops.preflight import Finding, fail, ok, skipped, warn

ENGINE_LEAST, COMPOSE_LEAST = (25, 0), (2, 20)
"""Engine 25 is the first that knows the images' start_interval; compose 2.20 waits for health checks as `up` needs it."""
CALL_SECONDS = 30.0
GIB = 1 << 30
SPACE_LEAST, SPACE_WISHED = 2 * GIB, 20 * GIB
"""Free bytes for state, personal models and ledger (a trial's home has some ten MB; a full volume stops the site)."""
MEMORY_LEAST = 4 * GIB
"""A worker that trains took 0.4 GB with the default data; real volumes and the two limits of the compose file need more."""
LABEL = "org.opencontainers.image.version"


@dataclass(frozen=True)
class Answer:
    """What a command said.

    Attributes:
        code: Exit status; 127 if the program is not there, 124 if it did not end in time.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str = ""
    err: str = ""

    @property
    def words(self) -> str:
        """The last line of what it complained of; for this terminal alone."""
        lines = (self.err or self.out).strip().splitlines()
        return lines[-1][:300] if lines else ""


Run = Callable[[Sequence[str], float], Answer]


def run_program(argv: Sequence[str], seconds: float = CALL_SECONDS) -> Answer:
    """Run a program with list arguments and return what it said; never raises for what the program does.

    Args:
        argv: Program and arguments.
        seconds: Patience.
    """
    try:
        done = subprocess.run(
            [*argv], capture_output=True, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL,
            env=clean_environment(), check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(127, err=f"{argv[0]}: not found")
    except subprocess.TimeoutExpired:
        return Answer(124, err=f"{argv[0]}: no answer within {seconds:.0f} s")
    except OSError as error:
        return Answer(126, err=f"{argv[0]}: {error}")
    return Answer(done.returncode, done.stdout, done.stderr)


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without variables that would point compose at other files or projects."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
    return {**kept, **(more or {})}


@dataclass(frozen=True)
class Engine:
    """What `docker info` says of an engine.

    Attributes:
        version: Of the engine.
        root: Its data folder, on its own machine.
        memory: Bytes.
        cpus: Processors.
        runtimes: Their names.
        system: "linux" or "windows".
        shifted: It maps user ids (rootless, or userns-remap), so that uid 10001 is another one outside.
        cdi: It may give devices by CDI.
    """

    version: str
    root: Path
    memory: int
    cpus: int
    runtimes: tuple[str, ...] = ()
    system: str = "linux"
    shifted: bool = False
    cdi: bool = field(default=False)


def version_tuple(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version like 26.1.5+dfsg1 or v2.26.1-4; (0, 0) if it is none."""
    match = re.match(r"\D{0,2}(\d+)\.(\d+)", text.strip())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_engine(run: Run = run_program) -> tuple[Finding, Engine | None]:
    """Return the finding about docker, engine and compose, and the engine if it answers."""
    asked = run(["docker", "info", "--format", "{{json .}}"], CALL_SECONDS)
    if asked.code == 127:
        return fail(
            "engine", "There is no `docker` command.", "Install Docker Engine with the compose plugin, version 25 or later."
        ), None  # fmt: skip
    info = _document(asked.out)
    said = (info.get("ServerErrors") or [""])[0] or asked.words
    if asked.code or not info.get("ServerVersion"):
        if "permission denied" in str(said).lower():
            remedy = "Run this as root, or let an administrator put this account into the group `docker`."
            return fail("engine", "This account may not use the engine.", remedy, str(said)), None
        remedy = "Start it (`systemctl start docker`), or set DOCKER_HOST to where it listens."
        return fail("engine", "The Docker engine does not answer.", remedy, str(said)), None
    engine = _engine(info)
    compose = run(["docker", "compose", "version", "--short"], CALL_SECONDS)
    return _judged(engine, compose), engine


def _engine(info: Mapping[str, Any]) -> Engine:
    options = [str(option) for option in info.get("SecurityOptions") or ()]
    return Engine(
        version=str(info["ServerVersion"]),
        root=Path(str(info.get("DockerRootDir") or "/var/lib/docker")),
        memory=int(info.get("MemTotal") or 0),
        cpus=int(info.get("NCPU") or 0),
        runtimes=tuple(sorted(info.get("Runtimes") or {})),
        system=str(info.get("OSType") or "linux"),
        shifted=any(option.startswith(("name=rootless", "name=userns")) for option in options),
        cdi=any("nvidia.com/gpu" in str(device) for device in info.get("DiscoveredDevices") or ()),
    )


def _judged(engine: Engine, compose: Answer) -> Finding:
    least, needed = ".".join(map(str, COMPOSE_LEAST)), f"{ENGINE_LEAST[0]}"
    if engine.system != "linux":
        return fail(
            "engine", f"The engine runs {engine.system} containers.", "Switch it to Linux containers."
        )
    if version_tuple(engine.version) < ENGINE_LEAST:
        return fail(
            "engine", f"The engine is {engine.version}; {needed} or later is needed.", "Update Docker Engine.",
            kind=MismatchError,
        )  # fmt: skip
    if compose.code:
        return fail(
            "engine", "`docker compose` does not work.",
            f"Install the compose plugin (docker-compose-plugin), {least} or later.", compose.words,
        )  # fmt: skip
    if version_tuple(compose.out) < COMPOSE_LEAST:
        return fail(
            "engine", f"Compose is {compose.out.strip()[:40]}; {least} or later is needed.", "Update the compose plugin.",
            kind=MismatchError,
        )  # fmt: skip
    shifted = "; it maps user ids" if engine.shifted else ""
    return ok("engine", f"Docker {engine.version}, compose {compose.out.strip()[:40]}{shifted}.")


def check_images(images: Mapping[str, str], version: str, run: Run = run_program) -> Finding:
    """Check that the images are on this machine and are of this version.

    Args:
        images: Image by service.
        version: What their label must say.
        run: Runs docker.
    """
    missing, other = [], []
    here = ", ".join(images.values())  # a registry's name is the hospital's
    for image in images.values():
        form = f'{{{{index .Config.Labels "{LABEL}"}}}}'
        asked = run(["docker", "image", "inspect", "--format", form, image], CALL_SECONDS)
        label = asked.out.strip()
        if asked.code:
            missing.append(image.rpartition("/")[2])
        elif label != version:
            other.append(f"{image.rpartition('/')[2]} ({label[:40] or 'no version'})")
    if missing:
        return fail(
            "images", f"Not on this machine: {', '.join(missing)}.",
            "Bring them here: `docker load -i FILE` with what the coordinator handed over, or `docker pull`, with "
            "WARDROUND_IMAGES set to the registry's prefix. Nothing is fetched by itself.", here,
        )  # fmt: skip
    if other:
        return fail(
            "images", f"Of another version than {version}: {', '.join(other)}.",
            "Load the images of this version, or set WARDROUND_VERSION to the one that the coordinator uses.", here,
            kind=MismatchError,
        )  # fmt: skip
    names = " and ".join(image.rpartition("/")[2] for image in images.values())
    return ok("images", f"{names} are here.", here)


def check_memory(engine: Engine, environ: Mapping[str, str]) -> Finding:
    """Hold the containers' limits against what the engine's machine has: memory, and processors (else nothing starts)."""
    worker, net = (
        bytes_of(environ.get(f"WARDROUND_{name}_MEMORY") or given)
        for name, given in (("WORKER", "4g"), ("NET", "2g"))
    )
    try:
        cpus = float(environ.get("WARDROUND_WORKER_CPUS") or 2)
    except ValueError:
        cpus = -1.0
    if worker is None or net is None or cpus <= 0:
        return fail(
            "machine", "WARDROUND_WORKER_MEMORY, _NET_MEMORY or _WORKER_CPUS is no amount.",
            "Give e.g. 4g, 512m and 2.",
        )  # fmt: skip
    has = f"{engine.memory / GIB:.1f} GiB memory, {engine.cpus} processors"
    if engine.cpus and max(cpus, 1.0) > engine.cpus:
        return fail(
            "machine", f"{has}; the worker's limit is {cpus:g} processors, which the engine refuses.",
            f"Set WARDROUND_WORKER_CPUS={engine.cpus}.",
        )  # fmt: skip
    if engine.memory and engine.memory < MEMORY_LEAST:
        return warn(
            "machine",
            f"{has}.",
            f"Training needs memory: use a machine with {MEMORY_LEAST / GIB:.0f} GiB or more.",
        )
    if engine.memory and engine.memory < worker + net:
        return warn(
            "machine", f"{has}; the containers' limits are {(worker + net) / GIB:.1f} GiB together.",
            "Set WARDROUND_WORKER_MEMORY and WARDROUND_NET_MEMORY so that both fit, else others on this machine suffer.",
        )  # fmt: skip
    return ok("machine", f"{has}; limits {(worker + net) / GIB:.1f} GiB and {cpus:g} processors.")


def bytes_of(text: str) -> int | None:
    """Return the bytes of 512m, 4g, 4gb or 1048576; none if it is no amount."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)b?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        return None
    return int(float(match[1]) * 1024 ** "bkmgt".index(match[2] or "b"))


def check_disk(engine: Engine, usage: Callable[[Path], Any] = shutil.disk_usage) -> Finding:
    """Check the free space of the engine's data folder, where the site's home (a named volume) lies."""
    try:
        free = int(usage(engine.root).free)
    except OSError:
        return skipped(
            "disk", "The engine's data folder is not on this machine, or not to be seen from this account."
        )
    said = f"{free / GIB:.1f} GiB free where images and the site's home lie"
    here = str(engine.root)
    if free < SPACE_LEAST:
        return fail(
            "disk", f"{said}; {SPACE_LEAST / GIB:.0f} GiB are needed.", "Free space there, or move the engine's data folder.",
            here, StorageError,
        )  # fmt: skip
    if free < SPACE_WISHED:
        return warn(
            "disk", f"{said}.", f"Have {SPACE_WISHED / GIB:.0f} GiB for personal models and logs.", here
        )
    return ok("disk", f"{said}.", here)


def check_gpu(wanted: bool, device: str, engine: Engine | None, run: Run = run_program) -> Finding:
    """Check the GPU if the configuration or the command asks for one.

    Args:
        wanted: --gpu was given.
        device: [compute] device of site.toml.
        engine: The engine, if it answers.
        run: Runs nvidia-smi.
    """
    asks = device.startswith("cuda")
    if not wanted and not asks:
        return skipped("gpu", f"Not asked for (device = {device}, no --gpu).")
    if asks and not wanted:
        return fail(
            "gpu", f"site.toml asks for {device}, but the container gets no GPU without --gpu.",
            'Add --gpu, or set device = "auto".',
        )  # fmt: skip
    if engine is None:
        return skipped("gpu", "The engine does not answer.")
    if "nvidia" not in engine.runtimes and not engine.cdi:
        return fail(
            "gpu", "The engine has no NVIDIA runtime.",
            "Install the NVIDIA container toolkit: `nvidia-ctk runtime configure --runtime=docker`, restart the engine.",
        )  # fmt: skip
    listed = run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], CALL_SECONDS)
    if listed.code == 127:
        return warn(
            "gpu", "`nvidia-smi` is not on this machine.", "Install NVIDIA's driver, if the engine runs here."
        )
    if listed.code:
        return fail(
            "gpu",
            "NVIDIA's driver does not answer.",
            "Mend it until `nvidia-smi` works.",
            listed.words,
            ProcessError,
        )
    cards = "; ".join(line.strip() for line in listed.out.splitlines() if line.strip())
    if device == "cpu":
        return warn(
            "gpu", f"{cards}; but site.toml says cpu.", 'Set device = "auto" or "cuda", or leave out --gpu.'
        )
    return ok("gpu", f"{cards}. The worker's image must be the CUDA build, which is not seen from here.")


def _document(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
