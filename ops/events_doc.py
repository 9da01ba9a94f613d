"""Writes docs/events.md from the table of events, so that the page cannot lie.

python -m ops.events_doc          write it
"""

from __future__ import annotations

from pathlib import Path

from common.events import EVENT_SCHEMA, EVENTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "events.md"
_INTRO = f"""# Events

Made by `python -m ops.events_doc` from `common/events.py`; do not edit.

Every process appends to its own file, one JSON object a line, schema version {EVENT_SCHEMA}:

| File | Written by | Where |
|---|---|---|
| `events.jsonl` | server | the coordinator's run folder |
| `events-trial.jsonl` | the operator's command | its run folder |
| `events-ALIAS.jsonl` | a hospital's worker | the hospital; in a trial, the run folder |
| `events-ALIAS-net.jsonl` | a hospital's SuperNode | the hospital; in a trial, the run folder |

Every line carries `v` (schema version), `t` (seconds since the epoch, UTC), `process` (server, relay, worker, supernode or
trial) and `event`; where they are known, `run` and `site` (the alias). A field that is not known is left out; a value that
is not finite is `null`. A line holds aliases, codes, figures and safe sentences: never a patient's identifier, a path below
the data folder, or the text of a foreign exception.

A reader leaves out a last line without its line end, lines that are no JSON, and events whose name it does not know.
`wardround report` and `wardround watch` read nothing else.

## The events
"""


def render() -> str:
    """Return the page."""
    parts = [_INTRO]
    for name, (meaning, fields) in EVENTS.items():
        parts.append(f"### `{name}`\n\n{meaning[:1].upper()}{meaning[1:]}.\n")
        if fields:
            rows = "\n".join(f"| `{field}` | {_cell(text)} |" for field, text in fields.items())
            parts.append(f"| Field | Meaning |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
