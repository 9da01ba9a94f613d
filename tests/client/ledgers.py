"""Ledgers for tests: filled, harmed, on a disk that is full."""

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta

from client.ledger import Ledger, Record

SHA = hashlib.sha256(b"part").hexdigest()
ZERO = "0" * 64


class Clock:
    def __init__(self):
        self.now = datetime(2026, 1, 1, 12, 0, 0, 123000, tzinfo=UTC)

    def __call__(self):
        self.now += timedelta(seconds=1)
        return self.now


def model(size=100, **fields):
    return Record(
        "model", "model", size, SHA, tensors=2, shapes={"a.weight": (3, 4), "a.bias": (4,)}, **fields
    )


def fill(home, calls=3, site=""):
    path = home / "ledger.jsonl"
    ledger = Ledger(path, Clock(), site=site)
    for round_ in range(1, calls + 1):
        ledger.append("run-1", round_, "round", "in", [model(decision="received")])
        ledger.append(
            "run-1", round_, "round", "out", [model(norm=1.5, cases=7), Record("metrics", "metrics", 9, SHA)]
        )
    ledger.close()
    return path


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def forged(line, **changes):
    """A line with other values and the hash that goes with them."""
    body = {**json.loads(line), **changes}
    body.pop("hash")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["hash"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def full_disk(patch, number, after):
    """Writes put `after` bytes on the disk, then fail; where the bytes fit they pass (truncating frees space)."""
    real = os.write

    def write(fd, data):
        if len(data) <= after:
            return real(fd, data)
        real(fd, data[:after])
        raise OSError(number, os.strerror(number), "/secret/path")

    patch.setattr(os, "write", write)
