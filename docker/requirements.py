"""Print what an image needs, one requirement a line: the base dependencies, or those of one extra.

    python docker/requirements.py [EXTRA]

An image's libraries are installed from this list before the code is, so that a change of the code alone leaves the
large layers as they are. Nothing but the standard library is imported.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(project: Path, extra: str = "") -> list[str]:
    """Return a project's requirements.

    Args:
        project: Its pyproject.toml.
        extra: Name of an optional group; the base dependencies if empty.

    Raises:
        KeyError: No such group.
    """
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    found: list[str] = table["optional-dependencies"][extra] if extra else table["dependencies"]
    return [line for line in found if not line.startswith(f"{table['name']}[")]


if __name__ == "__main__":
    lines = requirements(Path("pyproject.toml"), *sys.argv[1:2])
    print("\n".join(lines))  # noqa: T201 its output is its purpose
