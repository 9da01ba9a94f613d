"""A site's state of a run: the last rounds, so that a resume finds its partner."""

import pytest
import torch

from client.state import KEEP, SiteStates, join_states, split_state
from common.errors import PayloadError
from common.payload import State


def state(round_):
    return State({"w": torch.full((2,), float(round_))}, {"round": round_})


@pytest.fixture
def states(tmp_path):
    return SiteStates(tmp_path / "run")


def test_before_the_first_round_there_is_none(states):
    assert states.rounds() == []
    assert states.before(1) is None


def test_a_round_finds_the_state_of_the_round_before(states):
    for number in range(1, 6):
        before = states.before(number)
        assert (before is None) if number == 1 else (before.values == {"round": number - 1})
        states.write(number, state(number))
    assert states.rounds() == [3, 4, 5]
    assert len(states.rounds()) == KEEP


def test_a_round_that_is_asked_again_starts_from_the_same_state(states):
    for number in (1, 2, 3):
        states.write(number, state(number))
    assert states.before(3).values == {
        "round": 2
    }  # the coordinator resumes at round 2 and asks for round 3 again
    states.write(3, state(33))
    assert states.rounds() == [1, 2, 3]
    assert states.before(4).values == {"round": 33}


def test_a_site_that_sat_out_continues_from_its_newest_state(states):
    states.write(1, state(1))
    assert states.before(9).values == {"round": 1}
    states.write(9, state(9))
    assert states.rounds() == [1, 9]


def test_later_rounds_of_an_abandoned_continuation_go(states):
    for number in (1, 2, 3, 4, 5):
        states.write(number, state(number))
    states.write(5, state(50))
    assert states.rounds() == [3, 4, 5]
    states.write(4, state(40))
    assert states.rounds() == [3, 4]
    assert states.before(5).values == {"round": 40}


def test_a_damaged_state_is_refused_and_not_passed_over(states):
    for number in (1, 2):
        states.write(number, state(number))
    path = states.folder / "round-000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(PayloadError, match="checksum"):
        states.before(3)
    assert states.before(2).values == {"round": 1}


def test_states_are_joined_and_taken_apart_again():
    method = State({"personal/w": torch.ones(2), "a:b": torch.zeros(1)}, {"step": 3, "method:x": True})
    optimizer = State({"exp_avg/w": torch.full((2,), 2.0)}, {"step": 4})
    whole = join_states(method=method, optimizer=optimizer, empty=State())
    for prefix, part in (("method", method), ("optimizer", optimizer), ("empty", State())):
        back = split_state(whole, prefix)
        assert back.values == part.values
        assert back.tensors.keys() == part.tensors.keys()
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in part.tensors.items())
    assert split_state(whole, "none") == State()


def test_a_round_whose_former_state_is_gone_is_refused_and_not_begun_anew(states):
    for number in range(2, 8):
        states.write(number, state(number))
    assert states.before(2) is None  # it joined in round 2: nothing came before
    assert states.before(6).values == {"round": 5}
    with pytest.raises(PayloadError, match="before round 4 is gone: it has kept rounds 5 to 7"):
        states.before(4)
    (states.folder / "first.json").write_text("{}")
    with pytest.raises(PayloadError, match="first round"):
        states.before(4)
