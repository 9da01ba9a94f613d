"""The fault matrix as a Markdown table: each case's newest line of build/faults/results.jsonl.

python -m tests.faults.table                        print it
python -m tests.faults.table docs/reliability.md    write it there, between <!-- faults:begin --> and <!-- faults:end -->
"""

import json
import os
import sys
from pathlib import Path

from tests.faults.outcome import OUT, RESULTS

BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
HEAD = (
    "fault",
    "seed",
    "in round",
    "outcome",
    "seconds to the next whole round",
    "restarts",
    "retries",
    "resumes",
    "rounds",
)


def newest(path=RESULTS):
    """Return the newest line of every case and seed, in the order in which they first came."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found[(line["case"], line["seed"])] = line
    return list(found.values())


def cells(line):
    """Return one row: the verdict's code stands for its sentence."""
    outcome = line["outcome"]
    if outcome == "verdict":
        outcome = f"named: {line['verdict'].partition(':')[0]}"
    elif outcome not in ("ok", "verdict"):
        outcome = f"**{outcome}**"
    seconds = ", ".join("-" if value is None else f"{value:.1f}" for value in line["recovered_s"]) or "-"
    return (line["case"], line["seed"], line.get("round", "-"), outcome, seconds, *(
        line[name] for name in ("restarts", "retries", "resumes", "rounds")))  # fmt: skip


def table(lines):
    """Return the Markdown table."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(cells(line) for line in lines)]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows)
    days = sorted({line["measured"][:10] for line in lines})
    return f"{text}\n\n{len(lines)} cases, run {days[0]} to {days[-1]}{measured_on()}.\n"


def measured_on():
    """Return what they ran on, as far as it is known."""
    path = OUT / "environment.json"
    if not path.is_file():
        return ""
    about = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f", {about['cpus']} CPUs, {versions}"


def insert(page, text):
    """Return a page with the text between its marks.

    Raises:
        ValueError: The page has not exactly one pair of marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"expected one '{BEGIN}' and after it one '{END}'")
    return page[: page.index(BEGIN) + len(BEGIN)] + f"\n{text}" + page[page.index(END) :]


def main(argv):
    if not RESULTS.is_file():
        sys.exit("no results yet: run `make faults` first")
    text = table(newest())
    if not argv:
        print(text, end="")
        return
    page = Path(argv[0])
    try:
        whole = insert(page.read_text(encoding="utf-8"), text)
    except (OSError, ValueError) as error:
        sys.exit(f"{page}: {error}")
    beside = page.with_name(f".{page.name}.tmp")
    beside.write_text(whole, encoding="utf-8")
    os.replace(beside, page)


if __name__ == "__main__":
    main(sys.argv[1:])
