"""Run all benchmarks: `make bench`. Each writes build/bench/NAME.json with the environment beside it."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("overhead", "memory")


def main() -> None:
    """Run each in a process of its own."""
    for name in BENCHMARKS:
        subprocess.run([sys.executable, "-m", f"tests.bench.{name}", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
