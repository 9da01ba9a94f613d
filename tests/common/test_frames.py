"""Messages as streams of frames: whole or refused, and never more bytes than announced."""

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import frames
from common.errors import PayloadError, WardroundError
from common.frames import from_frames, to_frames
from common.proto.wardround_pb2 import Frame, PartStart

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
PARTS = st.dictionaries(NAMES, st.binary(max_size=40), max_size=5)


def part(name, size):
    return Frame(part=PartStart(name=name, nbytes=size))


def chunk(data):
    return Frame(chunk=data)


@settings(max_examples=50, deadline=None)
@given(PARTS, st.integers(1, 16))
def test_parts_come_back_in_order_whatever_the_chunk(parts, size):
    with patch.object(frames, "CHUNK_BYTES", size):
        sent = [Frame.FromString(frame.SerializeToString()) for frame in to_frames(parts)]
    assert all(len(frame.chunk) <= size for frame in sent)
    assert list(from_frames(sent).items()) == list(parts.items())


def test_a_large_part_is_cut_below_grpcs_limit_and_a_small_one_is_not():
    data = bytes(range(256)) * 20_000
    sent = list(to_frames({"large": memoryview(data), "small": bytearray(b"x"), "empty": b""}))
    assert [len(frame.chunk) for frame in sent] == [0, 2_000_000, 2_000_000, 1_120_000, 0, 1, 0]
    assert max(frame.ByteSize() for frame in sent) < 4 << 20
    assert from_frames(sent) == {"large": data, "small": b"x", "empty": b""}


@settings(max_examples=40, deadline=None)
@given(PARTS, st.integers(1, 8), st.data())
def test_a_stream_that_breaks_off_gives_whole_parts_or_an_error(parts, size, data):
    with patch.object(frames, "CHUNK_BYTES", size):
        sent = list(to_frames(parts))
    kept = sent[: data.draw(st.integers(0, max(len(sent) - 1, 0)))]
    try:
        got = from_frames(kept)
    except PayloadError as error:
        caught = str(error)
    else:
        caught = ""
        assert got.items() <= parts.items()
        assert len(got) < len(parts) or not parts or not list(parts.values())[-1]
    assert not caught or "broke off" in caught


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        ([chunk(b"x")], "no part"),
        ([Frame()], "no part"),
        ([part("", 1), chunk(b"x")], "without a name"),
        ([part("a", 0), part("a", 0)], "twice"),
        ([part("a", 1), chunk(b"x"), part("b", 0), part("a", 1), chunk(b"x")], "twice"),
        ([part("a", 2), chunk(b"x")], "has 1 bytes, 2 were announced"),
        ([part("a", 2), chunk(b"x"), part("b", 0)], "has 1 bytes, 2 were announced"),
        ([part("a", 2), chunk(b"xyz")], "longer than the 2 bytes"),
        ([part("a", 0), chunk(b"x")], "longer than the 0 bytes"),
        ([part("a", 2**64 - 1)], "more than"),
    ],
)
def test_a_malformed_stream_is_refused(stream, sentence):
    with pytest.raises(PayloadError, match=sentence):
        from_frames(stream)


def test_the_limit_counts_all_parts_and_is_kept_before_a_byte_is_taken():
    def stream():
        yield part("a", 6)
        yield chunk(b"123456")
        yield part("b", 5)
        raise AssertionError("bytes were taken after the limit")

    assert from_frames([part("a", 6), chunk(b"123456"), part("b", 4), chunk(b"1234")], limit=10).keys() == {
        "a",
        "b",
    }
    with pytest.raises(PayloadError, match="more than 10 bytes"):
        from_frames(stream(), limit=10)


FRAMES = st.one_of(
    st.builds(part, st.sampled_from(["", "a", "b"]), st.sampled_from([0, 1, 2, 2**63])),
    st.builds(chunk, st.binary(max_size=3)),
    st.just(Frame()),
)


@settings(max_examples=70, deadline=None)
@given(st.lists(FRAMES, max_size=6))
def test_any_stream_gives_what_it_announced_or_our_own_error(stream):
    try:
        got = from_frames(stream)
    except WardroundError:
        return
    announced = {frame.part.name: frame.part.nbytes for frame in stream if frame.HasField("part")}
    assert {name: len(data) for name, data in got.items()} == announced
