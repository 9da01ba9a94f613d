from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    HELLO: _ClassVar[Phase]
    ROUND: _ClassVar[Phase]
    CLOSING: _ClassVar[Phase]
    PING: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
HELLO: Phase
ROUND: Phase
CLOSING: Phase
PING: Phase

class Scalar(_message.Message):
    __slots__ = ("text", "integer", "number", "flag")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    flag: bool
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: _Optional[bool] = ...) -> None: ...

class TensorHead(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    nbytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class PayloadHead(_message.Message):
    __slots__ = ("name", "kind", "codec", "tensors", "meta", "nbytes", "sha256")
    class MetaEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    codec: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHead]
    meta: _containers.MessageMap[str, Scalar]
    nbytes: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., codec: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorHead, _Mapping]]] = ..., meta: _Optional[_Mapping[str, Scalar]] = ..., nbytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("schema", "software", "run", "round", "phase", "site", "cases", "loss", "payloads", "seconds", "failure", "device", "rounds", "versions", "ledger")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    schema: int
    software: str
    run: str
    round: int
    phase: Phase
    site: str
    cases: int
    loss: float
    payloads: _containers.RepeatedCompositeFieldContainer[PayloadHead]
    seconds: _containers.ScalarMap[str, float]
    failure: Failure
    device: str
    rounds: int
    versions: _containers.ScalarMap[str, str]
    ledger: str
    def __init__(self, schema: _Optional[int] = ..., software: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., site: _Optional[str] = ..., cases: _Optional[int] = ..., loss: _Optional[float] = ..., payloads: _Optional[_Iterable[_Union[PayloadHead, _Mapping]]] = ..., seconds: _Optional[_Mapping[str, float]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., device: _Optional[str] = ..., rounds: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., ledger: _Optional[str] = ...) -> None: ...

class Sum(_message.Message):
    __slots__ = ("numerator", "denominator")
    NUMERATOR_FIELD_NUMBER: _ClassVar[int]
    DENOMINATOR_FIELD_NUMBER: _ClassVar[int]
    numerator: float
    denominator: float
    def __init__(self, numerator: _Optional[float] = ..., denominator: _Optional[float] = ...) -> None: ...

class MetricSet(_message.Message):
    __slots__ = ("round", "split", "model", "cases", "sums", "primary")
    class SumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Sum
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Sum, _Mapping]] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    round: int
    split: str
    model: str
    cases: int
    sums: _containers.MessageMap[str, Sum]
    primary: str
    def __init__(self, round: _Optional[int] = ..., split: _Optional[str] = ..., model: _Optional[str] = ..., cases: _Optional[int] = ..., sums: _Optional[_Mapping[str, Sum]] = ..., primary: _Optional[str] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("sets",)
    SETS_FIELD_NUMBER: _ClassVar[int]
    sets: _containers.RepeatedCompositeFieldContainer[MetricSet]
    def __init__(self, sets: _Optional[_Iterable[_Union[MetricSet, _Mapping]]] = ...) -> None: ...

class PartStart(_message.Message):
    __slots__ = ("name", "nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    nbytes: int
    def __init__(self, name: _Optional[str] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("part", "chunk")
    PART_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    part: PartStart
    chunk: bytes
    def __init__(self, part: _Optional[_Union[PartStart, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...
