"""The cut of the whole, enforced: who may import whom, and what stays light."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common", "server", "client", "ops")

# room or folder -> modules (by prefix) it must not import
FORBIDDEN = {
    "common": ("server", "client", "ops"),
    "server": ("client", "ops"),
    "client": ("server", "ops"),
    "common/methods": ("flwr", "grpc", "monai", "nibabel", "server", "client", "ops"),
    "common/numerics": (
        "flwr",
        "grpc",
        "monai",
        "nibabel",
        "common.methods",
        "common.payload",
        "server",
        "client",
        "ops",
    ),
}
WITHOUT_TORCH = (
    "client.relay",
    "client.forkexec",
    "client.supernode",
    "common.frames",
    "common.flower",
    "common.events",
    "common.config",
)


def sources(room):
    return [
        path for path in (ROOT / room).rglob("*.py") if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]


@functools.cache
def imported(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_keep_their_direction(room):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imported(path)
        for banned in FORBIDDEN[room]
        if name == banned or name.startswith(banned + ".")
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["common/methods", "common/numerics"])
def test_pure_rooms_open_no_file(room):
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
    ]
    assert not wrong


def test_light_modules_import_neither_torch_nor_monai():
    """One interpreter for all: what it holds after each import is told by the module."""
    code = (
        "import importlib, json, sys\n"
        "seen = {}\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    seen[module] = [heavy for heavy in ('torch', 'monai') if heavy in sys.modules]\n"
        "print(json.dumps(seen))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *WITHOUT_TORCH], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {module: [] for module in WITHOUT_TORCH}


def test_no_room_carries_a_path_of_a_machine():
    wrong = [
        str(path.relative_to(ROOT))
        for room in (*ROOMS, "tests", "docs")
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".py", ".md", ".toml", ".j2"}
        and ("/wor" + "k/" in path.read_text() or "/ro" + "ot/" in path.read_text())
    ]
    assert not wrong


def test_files_stay_small():
    long = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for room in ROOMS
        for path in sources(room)
    }
    assert not {name: lines for name, lines in long.items() if lines > 450}
