"""A border for tests, messages to pass it, and an exact oracle of norms."""

import hashlib
import math

import torch

from client.border import Border
from client.ledger import read
from client.site_config import SiteConfig
from common.config import GuardConfig
from common.payload import Kind, Payload, PayloadSpec
from common.wire import ROUND, Envelope, MetricSet, encode

SECRET = "Mueller_Hans"
SPECS = (PayloadSpec("model", Kind.MODEL),)
TEMPLATE = {"w": torch.zeros(3, 4), "b": torch.zeros(4), "n": torch.zeros(2, dtype=torch.int64)}


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def tensors(value=1.0):
    return {"w": torch.full((3, 4), value), "b": torch.full((4,), -value), "n": torch.tensor([1, 10**12])}


def model(value=1.0, kind=Kind.MODEL):
    return {"model": Payload("model", kind, tensors(value))}


def question(run="run-1", round_=1, value=1.0, **fields):
    """A message of the coordinator."""
    fields = {"payloads": model(value), "config": '{"a": 1}', "phase": ROUND} | fields
    return encode(Envelope(run, round_, site="alpha", **fields))


def figures(cases, name="global"):
    return MetricSet(1, "validation", name, cases, {"dice": (3.5, 4.0)}, "dice")


def answer(run="run-1", round_=1, **fields):
    fields = {
        "payloads": model(),
        "metrics": [figures(4)],
        "cases": 10,
        "loss": 0.25,
        "phase": ROUND,
    } | fields
    return Envelope(run, round_, site="alpha", **fields)


class Borders:
    """Opens the border of one hospital again and again; the one before is closed."""

    def __init__(self, home):
        self.home, self.last = home / SECRET, None

    def __call__(self, policy=None, privacy=None):
        self.close()
        values = {"alias": "alpha", "data": "/none", "socket": "/none", "home": self.home}
        self.last = Border(
            SiteConfig.model_validate(values | {"policy": policy or {}, "privacy": privacy or {}})
        )
        return self.last

    def close(self):
        if self.last is not None:
            self.last.close()


def entries(border):
    return list(read(border.ledger.path))


def release(border, reply, received=None, guard=None, specs=SPECS):
    return border.release(reply, received or {}, specs, TEMPLATE, guard or GuardConfig())


def norm64(new, old=None):
    """The L2 norm in float64, over floating tensors, by Python's exact sum."""
    total = []
    for name, tensor in new.items():
        if tensor.is_floating_point():
            diff = tensor.double() - (old[name].double() if old else 0.0)
            total += [value * value for value in diff.reshape(-1).tolist()]
    return math.sqrt(math.fsum(total))
