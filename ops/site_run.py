"""A hospital's two containers by the kit's compose files: start, look, stop.

The kit is verified before its compose files are used, whatever else was skipped: who can change a compose file can do
everything on the machine that runs it. Looking and stopping need the project's name alone, so that they work with a kit
that has expired. What docker says in its own words is shown on the local terminal and goes nowhere else.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import VERDICT, ProcessError
from ops.containers import places
from ops.kit import Kit
from ops.kit_compose import LOCAL_IMAGES, compose_arguments, image_version
from ops.preflight_engine import CALL_SECONDS, Answer, Run, clean_environment, run_program
from ops.preflight_run import Installation, proxy_variable
from ops.preflight_site import key_folder
from ops.provision_files import sha256

SERVICES = ("site-net", "worker")
WAIT_SECONDS = 240
"""How long `up` waits for both health checks; site-net's is that the coordinator was heard."""
STOP_SECONDS = 120.0
EXEC_SECONDS = 60.0
LOG_LINES = 400
ENTRIES = 400
"""Newest entries of the ledger that are looked at; a round has some ten."""
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # compose writes some even into a pipe
# Runs in the site-net container with what it has: the health check's own answer, and since when there is silence.
_HEARD = (
    "import json, time\n"
    "from ops.containers import health, places\n"
    "heard = health.heard_at(places.NET, health.begun())\n"
    "ago = None if heard is None else max(time.time() - heard, 0.0)\n"
    "print(json.dumps({'wrong': health.site_net(), 'ago': ago}))\n"
)


@dataclass(frozen=True)
class Container:
    """One of a site's containers.

    Attributes:
        service: "site-net" or "worker".
        state: "running", "restarting", "exited", ...; "absent" if there is none.
        health: "healthy", "starting", "unhealthy"; empty without one.
        status: The engine's own line, e.g. "Up 3 minutes (healthy)".
        exit_code: Of its last end.
    """

    service: str
    state: str
    health: str = ""
    status: str = ""
    exit_code: int = 0

    @property
    def healthy(self) -> bool:
        """Whether it runs and its health check says so."""
        return self.state == "running" and self.health == "healthy"


@dataclass(frozen=True)
class Round:
    """What a site did in one round of a run, by its ledger.

    Attributes:
        run: The run.
        round: Its number; none for messages that belong to no round.
        time: Of the last entry (UTC, ISO 8601).
        received: Bytes that came in.
        released: Bytes that left.
        refused: Parts that were refused.
    """

    run: str
    round: int | None
    time: str
    received: int = 0
    released: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Status:
    """What is known of a running site.

    Attributes:
        containers: One for each service.
        heard: Seconds since the coordinator was heard, none if never or not known.
        silence: What is wrong with the connection; empty if nothing is.
        rounds: The last ones, newest last.
        ledger: Why there are none, if there are none.
        refusal: (time, sentence) of the last part that was refused, or of the last answer that was a failure, by the ledger.
        said: (service, time, sentence) of the last error of our own in each service's log.
    """

    containers: tuple[Container, ...]
    heard: float | None = None
    silence: str = ""
    rounds: tuple[Round, ...] = ()
    ledger: str = ""
    refusal: tuple[str, str] | None = None
    said: tuple[tuple[str, str, str], ...] = field(default=())

    @property
    def healthy(self) -> bool:
        """Whether both containers run and say that they are well."""
        return all(container.healthy for container in self.containers)


def environment(place: Installation, kit: Kit) -> dict[str, str]:
    """Return the variables that the kit's compose file reads, all of them, so that what was checked is what runs.

    Args:
        place: Where the parts lie.
        kit: The kit, verified.

    Raises:
        ConfigError: The environment names a proxy that cannot be used.
    """
    return {
        "WARDROUND_KIT": str(kit.folder.absolute()),
        "WARDROUND_KEYS": str(key_folder(kit, place.keys_place).absolute()),
        "WARDROUND_SITE_TOML": str(place.config_place),
        "WARDROUND_DATA": str(place.data_place),
        "WARDROUND_IMAGES": place.environ.get("WARDROUND_IMAGES") or LOCAL_IMAGES,
        "WARDROUND_VERSION": image_version(kit.about, place.environ),
        "WARDROUND_PROXY": proxy_variable(kit, place.environ),
        "WARDROUND_KIT_SHA256": kit.fingerprint,
        "WARDROUND_SITE_TOML_SHA256": _digest(place.config_place),
    }


def _digest(path: Path) -> str:
    """Return a file's SHA-256; empty if this account may not read it."""
    try:
        return sha256(path.read_bytes())
    except OSError:
        return ""


Call = Callable[[Sequence[str], Path, Mapping[str, str], float], int]


def call(argv: Sequence[str], folder: Path, variables: Mapping[str, str], seconds: float) -> int:
    """Run a program whose output goes to this terminal, and return its exit status.

    Args:
        argv: Program and arguments.
        folder: To run it in.
        variables: Beside those of this process.
        seconds: Patience.

    Raises:
        ProcessError: It is not there, or did not end in time.
    """
    try:
        return subprocess.run(
            [*argv], cwd=folder, env=clean_environment(variables), timeout=seconds, stdin=subprocess.DEVNULL, check=False
        ).returncode  # fmt: skip
    except FileNotFoundError as error:
        raise ProcessError(
            "There is no `docker` command: install Docker Engine with the compose plugin.", detail=str(error)
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ProcessError(
            f"`docker` did not end within {seconds:.0f} s: look at the engine (`docker info`), then try again."
        ) from error


def start(
    place: Installation, kit: Kit, project: str, *, wait: int = WAIT_SECONDS, caller: Call = call
) -> int:
    """Start a site's containers and wait until both are healthy.

    Args:
        place: Where the parts lie.
        kit: The kit, verified: its compose files are run.
        project: Compose project.
        wait: Seconds until it is given up; the containers go on.
        caller: Runs docker.

    Returns:
        docker's exit status: 0 if both are healthy.

    Raises:
        ConfigError: The environment names a proxy that cannot be used.
        ProcessError: docker is not there, or hangs.
    """
    folder = kit.folder.absolute()
    argv = ["docker", *compose_arguments(folder, project, gpu=place.gpu)]
    # In the kit's folder, which holds no .env: nothing but the environment counts.
    argv += ["up", "--detach", "--wait", "--wait-timeout", str(wait)]
    return caller(argv, folder, environment(place, kit), wait + STOP_SECONDS)


def stop(folder: Path, project: str, *, volumes: bool = False, caller: Call = call) -> int:
    """Stop and remove a site's containers and network.

    Args:
        folder: The kit's.
        project: Compose project.
        volumes: Also remove its volumes: state, personal models, ledger.
        caller: Runs docker.

    Returns:
        docker's exit status.

    Raises:
        ProcessError: docker is not there, or hangs.
    """
    argv = ["docker", "compose", "--project-name", project, "down", *(["--volumes"] if volumes else [])]
    return caller(argv, folder, {}, STOP_SECONDS)


def look(project: str, run: Run = run_program) -> Status:
    """Return what is known of a site that was started; asks the containers that run.

    Args:
        project: Compose project.
        run: Runs docker.

    Raises:
        ProcessError: The engine does not answer.
    """
    found = containers(project, run)
    running = {container.service for container in found if container.state == "running"}
    ago, silence = heard(project, run) if "site-net" in running else (None, "")
    rounds, refusal, why = (
        ledger(project, run) if "worker" in running else ((), None, "the worker does not run")
    )
    said = (
        (container.service, *line)
        for container in found
        if container.state != "absent" and (line := last_error(project, container.service, run))
    )
    return Status(found, ago, silence, rounds, why, refusal, tuple(said))


def containers(project: str, run: Run = run_program) -> tuple[Container, ...]:
    """Return a site's containers, also those that are not there.

    Raises:
        ProcessError: The engine does not answer.
    """
    asked = run(
        ["docker", "compose", "--project-name", project, "ps", "--all", "--format", "json"], CALL_SECONDS
    )
    if asked.code:
        raise ProcessError(
            "The Docker engine does not answer: start it, or run this as an account that may use it.",
            detail=asked.words,
        )
    rows = {str(row.get("Service")): row for row in _rows(asked.out)}
    found = []
    for service in SERVICES:
        row = rows.get(service)
        found.append(
            Container(
                service, str(row.get("State", "")), str(row.get("Health", "")), str(row.get("Status", "")),
                int(row.get("ExitCode") or 0),
            ) if row else Container(service, "absent")
        )  # fmt: skip
    return tuple(found)


def _rows(text: str) -> list[dict[str, Any]]:
    """Return compose's rows: an array before 2.21, a line each since."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        found.extend(row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict))
    return found


def _within(project: str, service: str, command: Sequence[str], run: Run) -> Answer:
    argv = ["docker", "compose", "--project-name", project, "exec", "--no-TTY", service, *command]
    return run(argv, EXEC_SECONDS)


def heard(project: str, run: Run = run_program) -> tuple[float | None, str]:
    """Return (seconds since the coordinator was heard, what is wrong) by the health check in the container.

    Args:
        project: Compose project.
        run: Runs docker.
    """
    asked = _within(project, "site-net", ["python", "-c", _HEARD], run)
    try:
        answer = json.loads(asked.out)
        ago = answer["ago"]
        return (None if ago is None else float(ago)), str(answer["wrong"])
    except (ValueError, KeyError, TypeError):
        return None, "the container did not answer"


def ledger(
    project: str, run: Run = run_program, most: int = 5
) -> tuple[tuple[Round, ...], tuple[str, str] | None, str]:
    """Return (the last rounds, the last refusal, why there is nothing) by `wardround ledger show` in the worker.

    Args:
        project: Compose project.
        run: Runs docker.
        most: How many rounds.
    """
    command = ["wardround", "ledger", "show", str(places.HOME), "--json", "--last", str(ENTRIES)]
    asked = _within(project, "worker", command, run)
    entries = [row for row in _rows(asked.out) if "direction" in row]
    rounds, refusal = taken(entries)
    if entries and asked.code:
        return (
            rounds[-most:],
            refusal,
            "the ledger is not whole: `wardround ledger verify` in the worker says where",
        )
    if not entries:
        none = "no ledger" in asked.err or asked.code == 0
        return (), None, "nothing has come in yet" if none else "the ledger cannot be read"
    return rounds[-most:], refusal, ""


def taken(entries: Iterable[Mapping[str, Any]]) -> tuple[tuple[Round, ...], tuple[str, str] | None]:
    """Return what a ledger's entries say: rounds in the order in which they were last touched, and the last refusal.

    Args:
        entries: As `wardround ledger show --json` prints them, in order.
    """
    rounds: dict[tuple[str, int | None], Round] = {}
    refusal: tuple[str, str] | None = None
    for entry in entries:
        number = entry.get("round") if entry.get("phase") in ("round", "closing") else None
        key = (str(entry.get("run", "")), number)
        time, size = str(entry.get("time", "")), int(entry.get("bytes") or 0)
        old = rounds.pop(key, Round(*key, time))
        refused = entry.get("decision") == "refused"
        if refused or (
            entry.get("kind") == "failure" and entry.get("reason")
        ):  # an answer that says no, or why not
            refusal = (time, str(entry.get("reason") or "no reason noted"))
        came = entry.get("direction") == "in"
        rounds[key] = Round(
            *key, time,
            old.received + (size if came and not refused else 0),
            old.released + (size if not came and not refused else 0),
            old.refused + refused,
        )  # fmt: skip
    return tuple(rounds.values()), refusal


def last_error(project: str, service: str, run: Run = run_program) -> tuple[str, str] | None:
    """Return (time, sentence) of the last error of our own in a service's log, none if there is none.

    Args:
        project: Compose project.
        service: Of it.
        run: Runs docker.
    """
    argv = [
        "docker",
        "compose",
        "--project-name",
        project,
        "logs",
        "--no-color",
        "--no-log-prefix",
        "--timestamps",
    ]
    asked = run([*argv, "--tail", str(LOG_LINES), service], CALL_SECONDS)
    for line in reversed((asked.out + "\n" + asked.err).splitlines()):
        time, _, said = _TERMINAL.sub("", line).partition(" ")
        if said.startswith(VERDICT):
            return time[:19] + "Z", said.removeprefix(VERDICT).strip()
    return None
