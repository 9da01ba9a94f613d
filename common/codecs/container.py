"""Named tensors as one self-describing run of bytes: header, one section a tensor, checksum. To the byte in docs/wire.md.

The whole header is read, and compared with the template where there is one, before any tensor is made. What is allocated
is then in proportion to the template's values (or to `limit`), whatever the bytes claim.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.codecs import get_codec
from common.codecs.fields import CodecError, Reader, varint
from common.codecs.halves import decode_half, encode_half
from common.codecs.piecewise import decode_piecewise, encode_piecewise
from common.codecs.positions import MAX_PLACES
from common.codecs.ternary import decode_mask, decode_ternary, encode_mask, encode_ternary
from common.errors import PayloadError
from common.frames import shown

MAGIC = b"WRDC"
VERSION = 1
CHECKSUM_BYTES = 4
MAX_DIMS = 64
MAX_SHAPE = 1 << 59  # product of sizes, zeros counted as 1; beyond it torch overflows where it counts strides
MAX_NAME = 1024
MAX_TENSORS = (
    1 << 16
)  # without a template; names share their starts, so that a few bytes may stand for a long one
DEFAULT_LIMIT = 1 << 28
"""Values that bytes without a template may describe: 1 GiB of float32."""

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

RAW = 0
AGAIN = "have the sender encode and send it again"
Floats = NDArray[np.float32]
Bytes = bytes | memoryview


@dataclass(frozen=True)
class Form:
    """How the values of one tensor are written: its number in the header, and both directions, flat."""

    code: int
    encode: Callable[[Floats], bytes]
    decode: Callable[[Bytes, int], Floats]


FORMS: dict[str, Form] = {
    "ternary": Form(1, encode_ternary, decode_ternary),
    "ternary-golomb": Form(2, lambda values: encode_ternary(values, coder="golomb"), decode_ternary),
    "piecewise": Form(4, encode_piecewise, decode_piecewise),
    "piecewise-float16": Form(
        5, lambda values: encode_piecewise(values, "float16"), lambda data, n: decode_piecewise(data, n, "float16")
    ),
    "piecewise-bf16": Form(
        6, lambda values: encode_piecewise(values, "bf16"), lambda data, n: decode_piecewise(data, n, "bf16")
    ),
    "piecewise-ternary": Form(
        7, lambda values: encode_piecewise(values, "ternary"), lambda data, n: decode_piecewise(data, n, "ternary")
    ),
    "float16": Form(8, lambda values: encode_half(values, "float16"), lambda data, n: decode_half(data, n, "float16")),
    "bf16": Form(9, lambda values: encode_half(values, "bf16"), lambda data, n: decode_half(data, n, "bf16")),
}  # fmt: skip
MASK = 3  # form of any dtype, in the codec "mask" only


@dataclass(frozen=True)
class _Head:
    """What the header says about one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    form: int
    nbytes: int


def encode(codec: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as bytes. Same tensors in the same order, same bytes.

    float32 tensors take the codec's form; tensors of other dtypes travel as they are, except that the codec "mask" takes any
    dtype with values 0 and 1 only.

    Args:
        codec: A name of `common.codecs.CODECS`.
        tensors: By name; on any device.

    Raises:
        ConfigError: Unknown codec.
        PayloadError: Values that are not finite, or that the codec cannot hold; a dtype or shape that cannot travel.
    """
    get_codec(codec)
    if len(tensors) > MAX_TENSORS:
        raise PayloadError(
            f"Codec '{codec}': expected at most {MAX_TENSORS} tensors, got {len(tensors)}; join some."
        )
    head = bytearray(MAGIC + bytes([VERSION, len(codec)]) + codec.encode("ascii") + varint(len(tensors)))
    sections: list[bytes] = []
    previous = b""
    for name, tensor in tensors.items():
        try:
            form, section = _encode_tensor(codec, tensor)
            coded = _encoded_name(name)
        except CodecError as error:
            raise PayloadError(f"Codec '{codec}', tensor '{shown(name)}': {error}.") from error
        shared = _shared(previous, coded)
        head += varint(shared) + varint(len(coded) - shared) + coded[shared:]
        head += bytes([form, DTYPES.index(tensor.dtype), tensor.ndim])
        head += b"".join(varint(size) for size in tensor.shape) + varint(len(section))
        sections.append(section)
        previous = coded
    body = b"".join([bytes(head), *sections])
    return body + zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little")


def decode(
    codec: str, data: Bytes, template: Mapping[str, Tensor] | None = None, *, limit: int = DEFAULT_LIMIT
) -> dict[str, Tensor]:
    """Return the tensors of `encode`; they own their memory.

    Args:
        codec: The name it was encoded by.
        data: All bytes and no others.
        template: Tensors whose names, shapes and dtypes are expected ("meta" tensors will do). Give it wherever there is
            one: bytes say how many values they stand for, and a few may stand for many.
        limit: Most values of all tensors together where there is no template.

    Raises:
        ConfigError: Unknown codec.
        PayloadError: Bytes that are damaged, cut, of another codec or version, not like the template, or beyond the limit.
    """
    get_codec(codec)
    try:
        heads, reader = _read_header(codec, data, MAX_TENSORS if template is None else len(template))
        _check_sizes(heads, reader.left(), template, limit)
    except CodecError as error:
        raise PayloadError(f"Codec '{codec}': {error}; {AGAIN}.") from error
    tensors: dict[str, Tensor] = {}
    for head in heads:
        try:
            section = reader.take(head.nbytes, "values")
            tensors[head.name] = _decode_tensor(codec, head, section)
        except CodecError as error:
            raise PayloadError(f"Codec '{codec}', tensor '{shown(head.name)}': {error}; {AGAIN}.") from error
    return tensors


def _encode_tensor(codec: str, tensor: Tensor) -> tuple[int, bytes]:
    if tensor.dtype not in DTYPES:
        raise CodecError(f"{str(tensor.dtype).removeprefix('torch.')} cannot travel; convert it first")
    if (
        tensor.ndim > MAX_DIMS
        or tensor.numel() > MAX_PLACES
        or math.prod(max(1, size) for size in tensor.shape) > MAX_SHAPE
    ):
        raise CodecError(
            f"expected at most {MAX_PLACES} values and {MAX_DIMS} dimensions, got {tensor.numel()} and {tensor.ndim}; "
            "split it"
        )
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if codec == "mask":
        values = flat != 0
        # -0.0 is no 0: compared by bits, as everything that is lossless
        if flat.numel() and not torch.equal(_bits(values.to(flat.dtype)), _bits(flat)):
            raise CodecError("expected a mask of 0 and 1, got other values")
        return MASK, encode_mask(values.numpy())
    if flat.is_floating_point() and not torch.isfinite(flat).all():
        raise CodecError("expected finite values, got NaN or infinity; look at the training that made them")
    if flat.dtype is torch.float32:
        form = FORMS[codec]
        return form.code, form.encode(flat.numpy())
    return RAW, _little(_bits(flat).numpy(), flat.itemsize).tobytes()


def _decode_tensor(codec: str, head: _Head, section: memoryview) -> Tensor:
    count = math.prod(head.shape)
    if head.form == MASK:
        flat = torch.from_numpy(decode_mask(section, count)).to(head.dtype)
    elif head.form != RAW:
        flat = torch.from_numpy(FORMS[codec].decode(section, count))
    else:
        if len(section) != count * head.dtype.itemsize:
            raise CodecError(
                f"expected {count * head.dtype.itemsize} bytes for {count} values, got {len(section)}"
            )
        array = np.frombuffer(section, dtype=np.uint8).copy()
        if head.dtype is torch.bool and (array > 1).any():
            raise CodecError("expected flags of 0 and 1, got other bytes")
        flat = torch.from_numpy(_little(array, head.dtype.itemsize)).view(head.dtype)
        if head.dtype.is_floating_point and not torch.isfinite(flat).all():
            raise CodecError("expected finite values, got NaN or infinity")
    return flat.reshape(head.shape)


def _bits(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _little(data: NDArray[np.uint8], itemsize: int) -> NDArray[np.uint8]:
    """Turn bytes of this machine's values into little-endian ones, or back."""
    width = np.dtype(f"u{itemsize}")
    return data.view(width).astype(width.newbyteorder("<")).view(np.uint8)


def _encoded_name(name: str) -> bytes:
    try:
        coded = name.encode()
    except UnicodeEncodeError:
        raise CodecError("expected a name that is text, got one that is not") from None
    if len(coded) > MAX_NAME:
        raise CodecError(f"expected a name of at most {MAX_NAME} bytes, got {len(coded)}")
    return coded


def _shared(previous: bytes, name: bytes) -> int:
    """Return how many bytes two names have in common at their start."""
    pairs = enumerate(zip(previous, name, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(previous), len(name)))


def _read_header(codec: str, data: Bytes, most: int) -> tuple[list[_Head], Reader]:
    """Return what the header says, and a reader of the sections."""
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise CodecError("expected bytes that a codec wrote, got others")
    if len(view) > len(MAGIC) and view[len(MAGIC)] != VERSION:
        raise CodecError(
            f"expected format version {VERSION}, got {view[len(MAGIC)]} (install the same version at both ends)"
        )
    body, checksum = view[:-CHECKSUM_BYTES], bytes(view[-CHECKSUM_BYTES:])
    if zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little") != checksum:
        raise CodecError("expected bytes that fit their checksum, got bytes altered or cut on the way")
    reader = Reader(body)
    reader.take(len(MAGIC) + 1, "the start")
    name = bytes(reader.take(reader.byte("the codec's length"), "the codec's name"))
    if name != codec.encode("ascii"):
        raise CodecError(
            f"expected bytes of this codec, got those of '{shown(name.decode('ascii', 'replace'))}'"
        )
    heads: list[_Head] = []
    previous = b""
    for _ in range(reader.varint("the number of tensors", most)):
        previous, head = _read_head(reader, codec, previous)
        heads.append(head)
    if len({head.name for head in heads}) != len(heads):
        raise CodecError("expected each tensor once, got one twice")
    return heads, reader


def _read_head(reader: Reader, codec: str, previous: bytes) -> tuple[bytes, _Head]:
    shared = reader.varint("the shared part of a name", len(previous))
    length = reader.varint("the length of a name", MAX_NAME - shared)
    coded = previous[:shared] + bytes(reader.take(length, "a name"))
    if _shared(previous, coded) != shared:
        raise CodecError("expected a name as short as it can be, got another form")
    try:
        name = coded.decode()
    except UnicodeDecodeError:
        raise CodecError("expected a name that is text, got other bytes") from None
    form, dtype = reader.byte("a form"), reader.byte("a dtype")
    if dtype >= len(DTYPES):
        raise CodecError(f"expected a dtype below {len(DTYPES)}, got {dtype}")
    if codec == "mask":
        wanted = MASK
    else:
        wanted = FORMS[codec].code if DTYPES[dtype] is torch.float32 else RAW
    if form != wanted:
        raise CodecError(f"expected form {wanted} for tensor '{shown(name)}', got {form}")
    dims = reader.byte("the number of dimensions")
    if dims > MAX_DIMS:
        raise CodecError(f"expected at most {MAX_DIMS} dimensions, got {dims}")
    shape = tuple(reader.varint("a size", MAX_SHAPE) for _ in range(dims))
    if math.prod(max(1, size) for size in shape) > MAX_SHAPE or math.prod(shape) > MAX_PLACES:
        raise CodecError(f"expected at most {MAX_PLACES} values in tensor '{shown(name)}', got more")
    # only a bound here: a form says itself how many bytes it needs
    return coded, _Head(
        name, DTYPES[dtype], shape, form, reader.varint("the length of a section", len(reader.data))
    )


def _check_sizes(heads: list[_Head], left: int, template: Mapping[str, Tensor] | None, limit: int) -> None:
    """Compare what the header claims with the bytes, and with the template or the limit, before anything is made."""
    if (claimed := sum(head.nbytes for head in heads)) != left:
        raise CodecError(f"expected {claimed} bytes of values, got {left}")
    if template is None:
        if (values := sum(math.prod(head.shape) for head in heads)) > limit:
            raise CodecError(
                f"expected at most {limit} values, got {values}; raise the limit if that is right, or"
            )
        return
    if {head.name for head in heads} != set(template):
        missing = sorted(set(template) - {head.name for head in heads})[:3]
        extra = sorted({head.name for head in heads} - set(template))[:3]
        raise CodecError(
            f"expected the model's tensors, got others: missing {[shown(name) for name in missing]}, "
            f"unexpected {[shown(name) for name in extra]}"
        )
    for head in heads:
        like = template[head.name]
        if head.shape != tuple(like.shape) or head.dtype != like.dtype:
            raise CodecError(
                f"expected tensor '{shown(head.name)}' as {like.dtype} {tuple(like.shape)}, got {head.dtype} {head.shape}"
            )
