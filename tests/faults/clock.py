"""Build the library that gives one process a wrong clock, with the machine's own C compiler."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


def compiler():
    """Return a C compiler's path, none if the machine has none."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(folder):
    """Compile the library and return its path."""
    library = Path(folder) / "wrong_clock.so"
    subprocess.run(
        [compiler(), "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE), "-ldl"], check=True
    )  # fmt: skip
    return library


def variables(library, seconds):
    """Return the variables that put a process's wall clock `seconds` off."""
    before = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{library} {before}".strip(), "FAULT_CLOCK": str(seconds)}
