"""A Docker engine for tests, and a compose project on it."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import docker

ROOT = Path(__file__).resolve().parents[2]
SITES = ("hospital-1", "hospital-2", "hospital-3")
TINY = {
    "WARDROUND_SUBJECTS": "3",
    "WARDROUND_VOXEL_MM": "8",
    "WARDROUND_SETTINGS": "width=4 levels=2 patch=16,16,16 patches_per_case=1",
    "WARDROUND_ROUNDS": "2",
    "WARDROUND_THREADS": "1",
}
EXPORTED = ("PATH", "DOCKER_HOST", "DOCKER_CONFIG", "BASE_IMAGE", "WHEELS_DIR", "PIP_CONF", "CA_BUNDLE")
KILL_MAIN = (
    "import os\n"
    "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
    "    parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]\n"
    "    if parent == '1': os.kill(int(pid), 9)\n"
)


def plain(environment):
    """Return an environment without what would point wardround or compose at other folders, projects or settings."""
    return {
        name: value for name, value in environment.items() if not name.startswith(("WARDROUND_", "COMPOSE_"))
    }


class NoEngine(Exception):
    """No engine is there and none can be started; says why."""


class Engine:
    """An engine that runs already, or one that a script starts for as long as this object is open.

    The script of WARDROUND_ENGINE_SCRIPT is sourced with a work folder (WARDROUND_ENGINE_FOLDER, else the given one); it
    exports DOCKER_HOST and what a build needs, and defines `stop_engine`.
    """

    def __init__(self, folder):
        self.env = dict(os.environ)
        self._shell = None
        script = os.environ.get("WARDROUND_ENGINE_SCRIPT")
        if script and not os.environ.get("DOCKER_HOST"):
            self._start(Path(script), Path(os.environ.get("WARDROUND_ENGINE_FOLDER") or folder))
        if shutil.which("docker", path=self.env["PATH"]) is None:
            raise NoEngine("there is no `docker` command, and WARDROUND_ENGINE_SCRIPT is not set")
        found = self.docker("version", "--format", "{{.Server.Version}}", check=False)
        if found.returncode:
            raise NoEngine(f"`docker version` says: {found.stderr.strip()[-200:]}")
        if self.docker("compose", "version", check=False).returncode:
            raise NoEngine("the `docker` command has no compose plugin")
        self.api = docker.DockerClient(base_url=self.env.get("DOCKER_HOST"), timeout=60)

    def _start(self, script, folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = " ".join(EXPORTED)
        text = (
            f'source "{script}" "{folder}" >&2 && for n in {names}; do printf "%s=%s\\n" $n "${{!n}}"; done && echo READY; '
            "read -r; stop_engine >&2"
        )
        log = (folder / "engine.log").open("wb")
        self._shell = subprocess.Popen(
            ["bash", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        for line in self._shell.stdout:
            if line.strip() == "READY":
                return
            name, _, value = line.rstrip("\n").partition("=")
            self.env[name] = value
        raise NoEngine(f"{script.name} failed: {(folder / 'engine.log').read_text()[-300:]}")

    def close(self):
        self.api.close()
        if self._shell is not None:
            self._shell.communicate("stop\n", timeout=60)

    def docker(self, *arguments, check=True, timeout=120, env=None):
        result = subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**self.env, **(env or {})},
            cwd=ROOT,
        )
        if check and result.returncode:
            raise AssertionError(
                f"docker {' '.join(arguments[:6])} ended with {result.returncode}:\n{result.stderr[-3000:]}"
            )
        return result


KINDS = {"container": ("--all",), "volume": (), "network": ()}
"""What compose makes for a project, and how to list all of it."""


def left(engine, project):
    """Return what there is of a compose project: (kind, identifier), whatever its profiles and files."""
    label = f"label=com.docker.compose.project={project}"
    return [
        (kind, found)
        for kind, more in KINDS.items()
        for found in engine.docker(kind, "ls", *more, "--quiet", "--filter", label).stdout.split()
    ]


def take_away(engine, project):
    """Remove all there is of a compose project: containers before what they use."""
    for kind, found in left(engine, project):
        engine.docker(kind, "rm", "--force", found, check=False)


class Stack:
    """The project of compose.yaml under a name and volumes of its own."""

    def __init__(self, engine, name):
        self.engine, self.name = engine, name
        self.files = ["-f", "compose.yaml"]
        self.env = dict(TINY)
        if engine.env.get("WHEELS_DIR"):
            self.files += ["-f", "docker/compose.local.yaml"]
            self.env["TORCH_INDEX"] = ""

    def compose(self, *arguments, check=True, timeout=600, **variables):
        env = {**self.env, **variables}
        return self.engine.docker(
            "compose", "-p", self.name, *self.files, *arguments, check=check, timeout=timeout, env=env
        )

    def container(self, service):
        return f"{self.name}-{service}-1"

    def inspect(self, service):
        return self.engine.api.containers.get(self.container(service)).attrs

    def python(self, service, code, check=True):
        """Run Python in a running container and return what it printed."""
        result = self.engine.docker("exec", self.container(service), "python", "-c", code, check=check)
        return result.stdout if check else result

    def kill(self, service):
        """Kill a container's program with SIGKILL, as a fault would; its restart policy sees that.

        The container's end may take the killing process along, so its own exit code says nothing.
        """
        self.python(service, KILL_MAIN, check=False)

    def in_volume(self, volume, *command):
        """Run a command of the worker image with a volume at /v, without network."""
        mount = f"{self.name}_{volume}:/v:ro"
        image = self.inspect("worker-1")["Config"]["Image"]
        return self.engine.docker(
            "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", "-v", mount, image, *command
        ).stdout

    def events(self, run, name="events.jsonl"):
        result = self.engine.docker(
            "exec", self.container("serverapp"), "cat", f"/runs/{run}/{name}", check=False
        )
        return [json.loads(line) for line in result.stdout.splitlines() if line.endswith("}")]

    def wait_for(self, what, seconds=240.0):
        limit = time.monotonic() + seconds
        while not what():
            if time.monotonic() > limit:
                raise AssertionError(f"waited {seconds:.0f} s in vain\n{self.logs()}")
            time.sleep(0.5)

    def state(self, service):
        return self.inspect(service)["State"]

    def verdict(self, seconds=400.0):
        """Wait for the trial's end and return its exit code."""
        self.wait_for(lambda: self.state("trial")["Status"] == "exited", seconds)
        return self.state("trial")["ExitCode"]

    def logs(self, *services):
        return self.compose("logs", "--no-color", "--tail", "40", *services, check=False).stdout[-8000:]

    def down(self):
        """Take everything away, of every profile: compose leaves what belongs to a profile that is not named."""
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "5", check=False)
