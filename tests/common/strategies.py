"""Hypothesis strategies for what travels, and how two of them are compared to the bit."""

import math

import torch
from hypothesis import strategies as st

from common.payload import Kind, Payload
from common.wire import CLOSING, DTYPES, HELLO, ROUND, Envelope, MetricSet

NAMES = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBERS = st.floats(width=64)
SCALARS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.integers(-(2**63), 2**63 - 1),
    NUMBERS,
    st.booleans(),
)


@st.composite
def tensors(draw):
    """A CPU tensor of any dtype that may travel, with any bits, down to no value and no dimension."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        data = bytearray(value % 2 for value in data)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


@st.composite
def payloads(draw, name=None):
    return Payload(
        draw(NAMES) if name is None else name,
        draw(st.sampled_from(list(Kind))),
        draw(st.dictionaries(NAMES, tensors(), max_size=3)),
        draw(st.dictionaries(NAMES, SCALARS, max_size=3)),
    )


METRICS = st.builds(
    MetricSet,
    round=st.integers(0, 2**32 - 1),
    split=NAMES,
    model=NAMES,
    cases=st.integers(0, 2**64 - 1),
    sums=st.dictionaries(NAMES, st.tuples(NUMBERS, NUMBERS), max_size=3),
    primary=NAMES,
)


@st.composite
def envelopes(draw):
    named = draw(st.lists(NAMES, unique=True, max_size=3))
    return Envelope(
        run=draw(NAMES),
        round=draw(st.integers(0, 2**32 - 1)),
        phase=draw(st.sampled_from([HELLO, ROUND, CLOSING])),
        site=draw(NAMES),
        rounds=draw(st.integers(0, 2**32 - 1)),
        payloads={name: draw(payloads(name)) for name in named},
        config=draw(NAMES),
        metrics=draw(st.lists(METRICS, max_size=2)),
        summary=draw(NAMES),
        cases=draw(st.integers(0, 2**64 - 1)),
        loss=draw(NUMBERS),
        seconds=draw(st.dictionaries(NAMES, NUMBERS, max_size=3)),
        failure=draw(st.none() | st.tuples(NAMES, NAMES)),
        device=draw(NAMES),
        software=draw(NAMES),
    )


def bits(tensor):
    """Everything of a tensor that must survive."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"",
    )


def plain(payload):
    """A payload as something that `==` compares to the bit; NaN equals NaN, 1 is not 1.0 is not True."""
    notes = {key: (type(value).__name__, repr(value)) for key, value in payload.meta.items()}
    return payload.name, payload.kind, [(name, bits(item)) for name, item in payload.tensors.items()], notes
