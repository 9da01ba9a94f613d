"""An engine that only answers, for the tests of `wardround site up, status, down`."""

import json

from ops.preflight_engine import Answer

KEY = "Site oak: the coordinator does not know this key. Send it the public key, to be registered."
UP = [
    {
        "Service": "worker",
        "State": "running",
        "Health": "healthy",
        "Status": "Up 2 minutes (healthy)",
        "ExitCode": 0,
    },
    {
        "Service": "site-net",
        "State": "running",
        "Health": "healthy",
        "Status": "Up 2 minutes (healthy)",
        "ExitCode": 0,
    },
]


def entry(number, direction="in", size=100, decision=None, phase="round", reason=""):
    decision = decision or ("received" if direction == "in" else "released")
    return {
        "run": "run-1", "round": number, "phase": phase, "direction": direction, "bytes": size, "decision": decision,
        "reason": reason, "time": f"2026-01-01T12:0{number}:00.000Z", "n": 1,
    }  # fmt: skip


class Engine:
    """Answers what `look` asks."""

    def __init__(self, rows=None, **answers):
        self.calls = []
        self.answers = {
            "ps": Answer(0, "\n".join(json.dumps(row) for row in (UP if rows is None else rows))),
            "exec --no-TTY site-net": Answer(0, json.dumps({"wrong": "", "ago": 4.2})),
            "exec --no-TTY worker": Answer(0, "\n".join(json.dumps(entry(n)) for n in (1, 2))),
            "logs": Answer(0, "2026-01-01T12:00:00.5Z an ordinary line\n"),
        } | answers

    def __call__(self, argv, seconds):
        line = " ".join(argv)
        self.calls.append(line)
        begin = "docker compose --project-name wardround-oak "
        assert line.startswith(begin)
        asked = line.removeprefix(begin)
        return next(answer for word, answer in self.answers.items() if asked.startswith(word))


class Docker:
    """Takes the place of `call`."""

    def __init__(self, code=0):
        self.code, self.calls = code, []

    def __call__(self, argv, folder, variables, seconds):
        self.calls.append((list(argv), folder, dict(variables), seconds))
        return self.code
