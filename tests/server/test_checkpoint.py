"""Checkpoints of the coordinator: the last two rounds, whole, and what an abandoned continuation left goes."""

import pytest
import torch
from safetensors.torch import load_file

from common.errors import PayloadError
from common.payload import State
from server.checkpoint import KEEP, Checkpoints


def state(round_):
    return State({"model/w": torch.full((2,), float(round_))}, {"round": round_})


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run")


def test_the_last_two_rounds_are_kept(checkpoints):
    assert checkpoints.rounds() == []
    for number in range(1, 13):
        assert checkpoints.write(number, state(number)) > 0
        assert checkpoints.rounds() == list(range(max(1, number - KEEP + 1), number + 1))
    assert checkpoints.read(12).values == {"round": 12}
    assert checkpoints.read(11).tensors["model/w"].tolist() == [11.0, 11.0]
    with pytest.raises(PayloadError, match="missing or incomplete"):
        checkpoints.read(10)


def test_a_round_that_is_written_again_replaces_the_old_one(checkpoints):
    checkpoints.write(1, state(1))
    checkpoints.write(1, state(5))
    assert checkpoints.read(1).values == {"round": 5}
    assert [path.name for path in checkpoints.folder.iterdir()] == ["round-000001"]


def test_a_continuation_from_an_earlier_round_keeps_what_it_writes(checkpoints):
    for number in (1, 2, 3, 4):
        checkpoints.write(number, state(number))
    checkpoints.write(2, state(20))  # continued from round 1
    assert checkpoints.rounds() == [2]
    assert checkpoints.read(2).values == {"round": 20}
    checkpoints.write(3, state(30))
    assert checkpoints.rounds() == [2, 3]


def test_other_files_are_left_alone(checkpoints):
    checkpoints.folder.mkdir(parents=True)
    (checkpoints.folder / "round-1.txt").write_text("note")
    (checkpoints.folder / "notes").mkdir()
    for number in (1, 2, 3):
        checkpoints.write(number, state(number))
    assert checkpoints.rounds() == [2, 3]
    assert (checkpoints.folder / "round-1.txt").read_text() == "note"
    assert (checkpoints.folder / "notes").is_dir()


def test_models_are_written_beside_the_checkpoints(checkpoints):
    size = checkpoints.save_model("global.safetensors", {"w": torch.ones(2)}, {"round": "3"})
    path = checkpoints.models / "global.safetensors"
    assert path.stat().st_size == size
    assert load_file(path)["w"].tolist() == [1.0, 1.0]
