"""Ways to spoil a message: each changes what it means, so that an end which accepts the result has a hole.

A mutator takes a seeded `random.Random` and the parts of a good message and returns the parts of a bad one. `SHARED`
spoils a message in either direction; tests/mutations_message.py has those of one direction. Where the bytes of a payload
are changed "rightly", size and checksum in the header are made to fit: then only the checks of meaning can refuse it.
"""

import hashlib

import torch

from common.frames import Parts
from common.payload import Kind
from common.proto import wardround_pb2 as pb
from common.wire import DTYPES

WORDS = ("other", "wieght", "..", "p.model", "a/b")
WEIRD = (float("nan"), float("inf"), float("-inf"))


# ---- tools -----------------------------------------------------------------------------------------------------------


def edit(parts: Parts, change) -> Parts:
    """Return the parts with their header changed in place by `change(header)`."""
    header = pb.Header.FromString(parts["head"])
    change(header)
    return {**parts, "head": header.SerializeToString(deterministic=True)}


def payload_of(header):
    return header.payloads[0]


def blob_name(parts: Parts) -> str:
    return next(name for name in parts if name.startswith("p."))


def on_payload(change):
    """Make a mutator that changes the payload's head: `change(rng, head)`."""
    return lambda rng, parts: edit(parts, lambda header: change(rng, payload_of(header)))


def on_header(change):
    return lambda rng, parts: edit(parts, lambda header: change(rng, header))


def with_blob(parts: Parts, blob: bytes, change=lambda head: None) -> Parts:
    """Replace the payload's bytes and make size and checksum right."""

    def fit(header):
        head = payload_of(header)
        head.nbytes, head.sha256 = len(blob), hashlib.sha256(blob).digest()
        change(head)

    return edit({**parts, blob_name(parts): blob}, fit)


def put(blob: bytes, place: int, data: bytes) -> bytes:
    return blob[:place] + data + blob[place + len(data) :]


def spot(rng, head):
    """Return a tensor's head and the place of one of its values in the payload."""
    item = rng.choice([item for item in head.tensors if item.nbytes])
    size = DTYPES[item.dtype].itemsize
    return item, item.offset + size * rng.randrange(item.nbytes // size)


def raw(value: float, dtype: str) -> bytes:
    return torch.tensor([value]).to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def flip_bytes(rng, parts):
    blob = parts[blob_name(parts)]
    for place in rng.sample(range(len(blob)), rng.randint(1, 4)):
        blob = put(blob, place, bytes([blob[place] ^ rng.randint(1, 255)]))
    return {**parts, blob_name(parts): blob}


def cut_payload(rng, parts):
    blob = parts[blob_name(parts)]
    return {**parts, blob_name(parts): blob[: rng.randrange(len(blob))]}


def extend_payload(rng, parts):
    return {**parts, blob_name(parts): parts[blob_name(parts)] + rng.randbytes(rng.randint(1, 64))}


def cut_rightly(rng, parts):
    blob = parts[blob_name(parts)]
    return with_blob(parts, blob[: rng.randrange(len(blob))])


def extend_rightly(rng, parts):
    return with_blob(parts, parts[blob_name(parts)] + rng.randbytes(rng.randint(1, 64)))


def swap_parts(rng, parts):
    one, other = rng.sample([name for name in parts if name not in {"config"}], 2)
    return {**parts, one: parts[other], other: parts[one]}


def drop_part(rng, parts):
    gone = rng.choice(["head", blob_name(parts)])
    return {name: data for name, data in parts.items() if name != gone}


def add_part(rng, parts):
    name = rng.choice(
        [f"{blob_name(parts)}2", "p.", "P.model", "extra", "head2", "\x1b[2J", "../x", "x" * 5000]
    )
    return {**parts, name: rng.choice([b"", parts[blob_name(parts)]])}


def rename_part(rng, parts):
    renamed = {
        f"p.{rng.choice(WORDS)}" if name == blob_name(parts) else name: data for name, data in parts.items()
    }
    assert renamed.keys() != parts.keys()
    return renamed


def empty_head(rng, parts):
    return {**parts, "head": b""}


def random_head(rng, parts):
    return {**parts, "head": rng.randbytes(rng.randint(1, 200))}


def cut_head(rng, parts):
    """Cut before the end of the first payload's head: behind it, what is left might be a whole message."""
    digest = hashlib.sha256(parts[blob_name(parts)]).digest()
    return {**parts, "head": parts["head"][: rng.randrange(parts["head"].index(digest) + len(digest))]}


def spoil_head(rng, parts):
    """Flip a bit of something in the header that must be exactly what it is."""
    head, found = parts["head"], payload_of(pb.Header.FromString(parts["head"]))
    run = pb.Header.FromString(head).run
    words = [found.sha256, found.kind.encode(), found.codec.encode(), found.tensors[0].dtype.encode()]
    words += [item.name.encode() for item in found.tensors]
    words += [run.encode()] if "metrics" in parts else []  # a site may be asked in any run
    word = rng.choice(words)
    place = head.index(word) + rng.randrange(len(word))
    return {**parts, "head": put(head, place, bytes([head[place] ^ (1 << rng.randrange(8))]))}


# ---- what the header says of a payload -------------------------------------------------------------------------------


def duplicate_payload(rng, header):
    header.payloads.append(payload_of(header))


def rename_payload(rng, parts):
    name = rng.choice(WORDS)
    moved = {f"p.{name}" if part == blob_name(parts) else part: data for part, data in parts.items()}
    if moved.keys() == parts.keys():
        name, moved = "another", {"p.another" if k == blob_name(parts) else k: v for k, v in parts.items()}
    return edit(moved, lambda header: setattr(payload_of(header), "name", name))


def surplus_payload(rng, parts):
    """A payload that nobody promised, whole in itself."""
    kind, blob = rng.choice(list(Kind)), rng.randbytes(8)

    def change(header):
        head = header.payloads.add(name="surplus", kind=str(kind), codec="raw", nbytes=8)
        head.sha256 = hashlib.sha256(blob).digest()
        head.tensors.add(name="w", dtype="float32", shape=[2], offset=0, nbytes=8)

    return edit({**parts, "p.surplus": blob}, change)


def rename_tensor(rng, head):
    item = rng.choice(head.tensors)
    item.name = rng.choice(
        [item.name + "x", item.name[:-1], item.name.upper(), "\x1b[2J", "", "w" * 5000, "w\nx"]
    )


def swap_tensor_names(rng, head):
    """The bytes of one tensor under the name of another of another shape."""
    one = rng.choice(head.tensors)
    other = next(item for item in head.tensors if list(item.shape) != list(one.shape))
    one.name, other.name = other.name, one.name


def twice_tensor_name(rng, head):
    one, other = rng.sample(list(head.tensors), 2)
    one.name = other.name


def drop_tensor(rng, parts):
    """The last tensor is taken away, bytes and all."""
    last = payload_of(pb.Header.FromString(parts["head"])).tensors[-1]
    return with_blob(parts, parts[blob_name(parts)][: last.offset], lambda head: head.tensors.pop())


def surplus_tensor(rng, parts):
    blob = parts[blob_name(parts)]
    name = rng.choice(["extra", "module.weight", "\x1b[2J"])
    add = lambda head: head.tensors.add(name=name, dtype="float32", shape=[1], offset=len(blob), nbytes=4)  # noqa: E731
    return with_blob(parts, blob + bytes(4), add)


def change_kind(rng, head):
    others = [str(kind) for kind in Kind if kind != head.kind]
    head.kind = rng.choice([*others, "", "patients", "MODEL", "\x1b[2J", "k" * 5000])


def change_codec(rng, head):
    head.codec = rng.choice(["", "pickle", "zip", "RAW", "raw ", "\x1b[2J"])


def change_dtype(rng, head):
    item = rng.choice(head.tensors)
    known = [name for name in DTYPES if name != item.dtype]
    item.dtype = rng.choice([*known, "", "object", "float12", "torch.float32", "\x1b[2J"])


def convert_dtype(rng, parts):
    """Other numbers of the same names and shapes, with everything else right."""
    head = payload_of(pb.Header.FromString(parts["head"]))
    other = rng.choice(["float64", "float16", "bfloat16", "int64", "int8"])
    chunks, places = [], []
    for item in head.tensors:
        data = bytearray(parts[blob_name(parts)][item.offset : item.offset + item.nbytes])
        values = torch.frombuffer(data, dtype=DTYPES[item.dtype]).to(DTYPES[other])
        chunks.append(values.view(torch.uint8).numpy().tobytes())
        places.append((sum(map(len, chunks[:-1])), len(chunks[-1])))

    def change(head):
        for item, (offset, nbytes) in zip(head.tensors, places, strict=True):
            item.dtype, item.offset, item.nbytes = other, offset, nbytes

    return with_blob(parts, b"".join(chunks), change)


def change_shape(rng, head):
    item = rng.choice([item for item in head.tensors if len(item.shape) > 1])
    shape = list(item.shape)
    item.shape[:] = rng.choice(
        [shape[::-1], [*shape, 1], [1, *shape], [shape[0] * shape[1]], [*shape, 2], []]
    )


def giant_shape(rng, head):
    item = rng.choice(head.tensors)
    item.shape[:] = rng.choice(
        [[2**63, 2**63], [2**64 - 1], [0, 2**62, 2**62], [2**40] * 3, [1] * 5000, [2**32] * 2]
    )
    item.nbytes = rng.choice([item.nbytes, 0, 2**64 - 1])


def change_place(rng, head):
    item, field = rng.choice(head.tensors), rng.choice(["offset", "nbytes"])
    value = getattr(item, field)
    setattr(item, field, rng.choice([value + 4, value + 1, value ^ 1, 2**64 - 1, 2**63, value + 2**32]))


def change_size(rng, head):
    head.nbytes = rng.choice([head.nbytes + 1, head.nbytes - 1, 0, 2**64 - 1])


def change_checksum(rng, head):
    head.sha256 = rng.choice([b"", bytes(32), head.sha256[:-1], head.sha256 + b"\0", head.sha256[::-1]])


def not_finite(rng, parts):
    item, place = spot(rng, payload_of(pb.Header.FromString(parts["head"])))
    return with_blob(parts, put(parts[blob_name(parts)], place, raw(rng.choice(WEIRD), item.dtype)))


def enormous(rng, parts):
    item, place = spot(rng, payload_of(pb.Header.FromString(parts["head"])))
    return with_blob(
        parts, put(parts[blob_name(parts)], place, raw(rng.choice([1e30, -1e30, 3e38]), item.dtype))
    )


def bad_note(rng, head):
    note = head.meta[rng.choice(["note", "\x1b[2J", "x" * 5000])]
    value = rng.choice([*WEIRD, None])
    if value is None:
        note.Clear()
    else:
        note.number = value


def other_schema(rng, header):
    header.schema = rng.choice([0, 2, 99, 2**32 - 1])
    header.software = rng.choice(["9.9", "\x1b[2J", "v" * 5000, ""])


SHARED = {
    function.__name__: function
    for function in (
        flip_bytes, cut_payload, extend_payload, cut_rightly, extend_rightly, swap_parts, drop_part, add_part,
        rename_part, empty_head, random_head, cut_head, spoil_head, rename_payload, surplus_payload, drop_tensor,
        surplus_tensor, convert_dtype, not_finite, enormous,
    )
} | {
    function.__name__: on_payload(function)
    for function in (
        rename_tensor, swap_tensor_names, twice_tensor_name, change_kind, change_codec, change_dtype, change_shape,
        giant_shape, change_place, change_size, change_checksum, bad_note,
    )
} | {function.__name__: on_header(function) for function in (duplicate_payload, other_schema)}  # fmt: skip
