"""Ways to spoil what a message says beside its payloads: `UP` for an answer, `DOWN` for what the coordinator sends."""

import json
import random

from common.frames import Parts
from common.proto import wardround_pb2 as pb
from tests.mutations import SHARED, on_header

MARKUP = (
    "<script>alert(1)</script>",
    "[red]x[/red]",
    "dice\n",
    "a\tb",
    "\x1b[2J",
    "",
    "x" * 81,
    "a'b",
    "\u202edice",
)


# ---- what an answer says beside ---------------------------------------------------------------------------------------


def other_round(rng, header):
    header.round = rng.choice([0, header.round - 1, header.round + 1, 2**32 - 1])


def other_run(rng, header):
    header.run = rng.choice(["", "other", header.run + "x", "../" + header.run, "\x1b[2J"])


def other_site(rng, header):
    header.site = rng.choice(
        ["alpha", "gamma", "", header.site.upper(), header.site + " ", "nobody", "s" * 5000]
    )


def other_phase(rng, header):
    header.phase = rng.choice([phase for phase in (0, 1, 3, 4, 99) if phase != header.phase])


def bad_cases(rng, header):
    header.cases = rng.choice([0, header.cases + 1, header.cases * 1000, 2**63, 2**64 - 1])


def bad_seconds(rng, header):
    header.seconds[rng.choice(MARKUP)] = 1.0


def bad_ledger(rng, header):
    header.ledger = rng.choice(["x", "1:abc", "<b>", "1:" + "g" * 64, "1" * 5000, header.ledger + "\n"])


def bad_metrics(rng, parts):
    message = pb.Metrics.FromString(parts["metrics"])
    word, entry = rng.choice(MARKUP), rng.choice(message.sets)
    field = rng.choice(["split", "model", "primary", "sums"])
    if field == "sums":
        entry.sums[word].numerator = 1.0
    else:
        setattr(entry, field, word)
    return {**parts, "metrics": message.SerializeToString(deterministic=True)}


def no_metrics(rng, parts):
    return {
        **parts,
        "metrics": rng.choice([b"\xff\xff\xff", b"\x0a\x05ab", parts["metrics"][:-1], b"<metrics/>"]),
    }


def failure_text(rng, header):
    """A site that says it failed, in a text that fills the page."""
    header.failure.code = rng.choice(["payload", "data", "policy"])
    header.failure.message = rng.choice(["x", "no training case. "]) * rng.choice([1000, 200_000])


# ---- what the coordinator says beside --------------------------------------------------------------------------------


def bad_config(rng, parts):
    """A configuration that cannot be read, or is another run's."""
    document = json.loads(parts["config"])
    document["train"]["lr"] = rng.choice([-1, 0, "fast"])
    texts = [
        b"{", b"", b"[]", b"null", b'{"methd":"fedavg"}', b'{"method":"none"}', b"\xff\xfe", b'{"version":2}',
        b'{"train":{"lr":NaN}}', b"[" * 5000, json.dumps(document).encode(), parts["config"][:-1],
        b'{"data":{"channels":["T1"]}}', b'{"params":{"mu":1}}' ,
    ]  # fmt: skip
    return {**parts, "config": rng.choice(texts)}


def bad_round(rng, header):
    header.round = 0


def bad_phase(rng, header):
    header.phase = rng.choice([0, 4, 5, 99, 2**31 - 1])


def bad_run(rng, header):
    header.run = rng.choice(["", "..", "../x", "a/b", ".hidden", "\x1b[2J", "r" * 81, "r\n", "/etc"])


def bad_software(rng, header):
    header.software = rng.choice(["", "0.0.1", "9.9", header.software + "x", "\x1b[2J", "v" * 5000])


UP = SHARED | {
    function.__name__: on_header(function)
    for function in (
        other_round, other_run, other_site, other_phase, bad_cases, bad_seconds, bad_ledger, failure_text,
    )
} | {"bad_metrics": bad_metrics, "no_metrics": no_metrics}  # fmt: skip

DOWN = SHARED | {
    function.__name__: on_header(function)
    for function in (other_site, bad_round, bad_phase, bad_run, bad_software)
} | {"bad_config": bad_config}  # fmt: skip


def spoil(mutators, seed: int, parts: Parts) -> tuple[str, Parts]:
    """Return the name of a mutator and what it makes of the parts; every mutator comes in turn."""
    name = list(mutators)[seed % len(mutators)]
    spoilt = mutators[name](random.Random(seed), dict(parts))
    assert spoilt != parts, f"{name}, seed {seed}, changed nothing"
    return name, spoilt
