"""State on disk: whole or not at all, checked when it is read, the same bytes for the same state."""

import hashlib
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load

from common import store
from common.errors import PayloadError, StorageError
from common.payload import State
from common.store import (
    keep_rounds,
    read_state,
    saved_rounds,
    tensor_bytes,
    write_bytes,
    write_state,
    write_tensors,
)
from tests.common.strategies import SCALARS, bits, tensors

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


def state(value=1.0, **values):
    return State({"model/w": torch.full((2, 3), value), "opt/step": torch.tensor(3)}, {"round": 2, **values})


def same(first, second):
    return (
        {name: bits(tensor) for name, tensor in first.tensors.items()} == {name: bits(tensor) for name, tensor in second.tensors.items()}
        and {key: (type(value), repr(value)) for key, value in first.values.items()}
        == {key: (type(value), repr(value)) for key, value in second.values.items()}
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(NAMES, tensors(), max_size=4), st.dictionaries(NAMES, SCALARS, max_size=3))
def test_a_state_comes_back_to_the_bit(tmp_path_factory, named, values):
    folder = tmp_path_factory.mktemp("state") / "round-000001"
    sent = State(named, values)
    assert write_state(folder, sent) == sum(path.stat().st_size for path in folder.iterdir())
    assert same(read_state(folder), sent)


def test_same_state_same_bytes_whatever_the_order_and_the_notes():
    first = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16), "c": torch.tensor(7)}
    notes = {f"note{n}": str(n) for n in range(8)}
    seen = {
        tensor_bytes(dict(order), dict(words))
        for order in (list(first.items()), list(reversed(first.items())))
        for words in (list(notes.items()), list(reversed(notes.items())), *[list(notes.items())] * 8)
    }
    assert len(seen) == 1


def test_two_writes_of_one_state_are_the_same_files(tmp_path):
    made = State(state().tensors | {"a": torch.zeros(1)}, {"y": 1, "x": 2})
    write_state(tmp_path / "a", made)
    write_state(
        tmp_path / "b", State(dict(reversed(made.tensors.items())), dict(reversed(made.values.items())))
    )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_notes_of_a_model_can_be_read_with_safetensors_own_means(tmp_path):
    size = write_tensors(tmp_path / "m" / "model.safetensors", {"w": torch.ones(2)}, {"round": "3"})
    assert (tmp_path / "m" / "model.safetensors").stat().st_size == size
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["wardround"]) == {"round": "3"}
        assert list(file.keys()) == ["w"]


def test_tensors_that_share_memory_or_are_no_plain_block_are_stored_as_their_values():
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tied = {
        "all": base,
        "same": base,
        "row": base[1],
        "turned": base.t(),
        "wide": torch.ones(1).expand(4),
        "tied": base[0].requires_grad_(False),
    }
    back = load(tensor_bytes(tied))
    assert {name: bits(tensor) for name, tensor in back.items()} == {
        name: bits(tensor) for name, tensor in tied.items()
    }


# ---- a crash at any moment -------------------------------------------------------------------------------------------


class Crash(BaseException):
    """As if the process ended here: nothing but cleaning by others runs afterwards."""


def crash_at(monkeypatch, function, number):
    """Let the n-th call of a function of `os` end the writer, and every clean-up after it do nothing."""
    real = getattr(os, function)
    calls = []

    def call(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            monkeypatch.setattr(store.shutil, "rmtree", lambda *a, **k: None)
            raise Crash
        return real(*arguments, **options)

    monkeypatch.setattr(os, function, call)
    return calls


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_crash_while_replacing_leaves_the_old_state_or_the_new_one(tmp_path, monkeypatch, function, number):
    folder = tmp_path / "round-000001"
    old, new = state(1.0), state(2.0, more=1)
    write_state(folder, old)
    with monkeypatch.context() as patched:
        calls = crash_at(patched, function, number)
        try:
            write_state(folder, new)
        except Crash:
            finished = False
        else:
            finished = True
    assert finished == (len(calls) < number)
    found = read_state(folder)
    assert same(found, new) or (same(found, old) and not finished)
    assert saved_rounds(tmp_path) == [1]
    write_state(folder, new)  # and the next write is a write like any other
    assert same(read_state(folder), new)
    keep_rounds(tmp_path, 0, 2)
    assert list(tmp_path.iterdir()) == []  # nothing of the crash stays for ever


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_crash_in_the_first_write_leaves_nothing_that_could_be_read(tmp_path, monkeypatch, number):
    folder = tmp_path / "round-000001"
    with monkeypatch.context() as patched:
        crash_at(patched, "fsync", number)
        with pytest.raises(Crash):
            write_state(folder, state())
    assert saved_rounds(tmp_path) == []
    with pytest.raises(PayloadError, match="missing or incomplete"):
        read_state(folder)


def test_a_failed_write_cleans_up_and_keeps_the_old(tmp_path, monkeypatch):
    write_bytes(tmp_path / "file", b"old")
    write_state(tmp_path / "round-000001", state(1.0))

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="it is full"):
            write_bytes(tmp_path / "file", b"new")
        with pytest.raises(StorageError, match="it is full"):
            write_state(tmp_path / "round-000001", state(2.0))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert same(read_state(tmp_path / "round-000001"), state(1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "round-000001"]


# ---- damage ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_no_flipped_byte_goes_unnoticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("state") / "round-000001"
    write_state(folder, state())
    path = folder / data.draw(st.sampled_from(["state.safetensors", "state.json", "manifest.json"]))
    spoiled = bytearray(path.read_bytes())
    spoiled[data.draw(st.integers(0, len(spoiled) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(spoiled)
    try:
        found = read_state(folder)
    except PayloadError as error:
        sentence = str(error)
    else:
        sentence = ""
        assert path.name == "manifest.json"  # a flip in the software's name, or in white space, harms nothing
        assert same(found, state())
    assert str(folder) not in sentence


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("spoil", ["missing", "empty", "cut"])
def test_an_incomplete_state_is_refused(tmp_path, name, spoil):
    write_state(tmp_path / "s", state())
    path = tmp_path / "s" / name
    if spoil == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if spoil == "cut" else b"")
    with pytest.raises(PayloadError) as caught:
        read_state(tmp_path / "s")
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path) in caught.value.detail


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        3,
        None,
        {},
        {"schema": 1},
        {"schema": 1, "files": []},
        {"schema": 1, "files": {"state.json": 3, "state.safetensors": None}},
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path, manifest):
    write_state(tmp_path / "s", state())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PayloadError):
        read_state(tmp_path / "s")


def test_another_schema_is_refused_with_both_numbers(tmp_path):
    write_state(tmp_path / "s", state())
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(PayloadError, match="has schema 2, this software reads 1"):
        read_state(tmp_path / "s")


def test_the_manifest_says_what_the_files_are(tmp_path):
    write_state(tmp_path / "s", state())
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (tmp_path / "s" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_rounds_beyond_six_digits_are_found(tmp_path):
    for number in (999_999, 1_000_000):
        write_state(store.state_folder(tmp_path, number), state())
    assert saved_rounds(tmp_path) == [999_999, 1_000_000]
    assert saved_rounds(tmp_path / "none") == []
