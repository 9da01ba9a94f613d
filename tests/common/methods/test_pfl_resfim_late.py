"""pFL-ResFIM: a site that was away at the only measurement measures when it comes, and what is told of the masks."""

import json

import pytest
import torch

from common import resfim
from common.method import Accumulator
from common.payload import State
from common.store import tensor_bytes
from tests.common.methods.resfim_lab import advance, config, three_sites
from tests.harness import Federation, MemoryLink

ONCE = [{"freeze_after": 2}, {"every": 10}]


@pytest.fixture
def lab():
    return three_sites()


def away(alias, rounds):
    """Lose a site's answers of some rounds, as if it had not been there; it keeps no state of them."""

    def tamper(name, number, payloads):
        return None if name == alias and number in rounds else payloads

    return tamper


def forget(loop, alias, rounds):
    for number in rounds:
        loop.states[alias].pop(number, None)


def sent_styles(loop, number):
    return {
        alias
        for alias, round_, question, _ in loop.seen
        if round_ == number and "styles" in question.payloads
    }


def sensitive(loop, alias, number):
    return sum(int(mask.sum()) for mask in loop.states[alias][number].part("mask").values())


@pytest.mark.slow
@pytest.mark.parametrize("params", ONCE)
def test_a_site_that_was_away_at_the_only_measurement_measures_when_it_comes(lab, params):
    loop = lab.start(config(6, hidden=(8,), **params), tamper=away("b", {2, 3}))
    for number in range(1, 7):
        loop.state = loop.round(number)
        if number in (2, 3):
            forget(loop, "b", (number,))
    assert [sent_styles(loop, number) for number in range(1, 7)] == [
        set(),
        {"a", "b", "c"},
        {"b"},
        {"b"},
        set(),
        set(),
    ]
    assert sensitive(loop, "b", 4) > 0
    size = sum(tensor.numel() for tensor in loop.state.part("model").values())
    last = {alias: answer for alias, number, _, answer in loop.seen if number == 6}
    for answer in last.values():
        assert sum(tensor.numel() for tensor in answer.payloads["model"].tensors.values()) < size
    assert resfim.measured(loop.state) == {"a", "b", "c"}


@pytest.mark.slow
def test_a_site_that_comes_after_the_measurement_has_a_mask_in_its_first_round(lab):
    loop = lab.start(config(5, hidden=(8,), freeze_after=2), tamper=away("c", {1, 2, 3}))
    for number in (1, 2, 3):
        loop.state = loop.round(number)
        forget(loop, "c", (number,))
    assert resfim.measured(loop.state) == {"a", "b"}
    loop.state = loop.round(4)
    assert sent_styles(loop, 4) == {"c"}
    assert sensitive(loop, "c", 4) > 0
    loop.state = loop.round(5)
    assert sent_styles(loop, 5) == set()


@pytest.mark.slow
def test_masks_that_were_due_before_there_were_styles_are_measured_with_the_first_ones(lab):
    loop = lab.start(config(3, hidden=(8,), first=1, freeze_after=1))
    advance(loop, 3)
    assert [sent_styles(loop, number) for number in (1, 2, 3)] == [set(), {"a", "b", "c"}, set()]
    assert all(sensitive(loop, alias, 3) for alias in lab.aliases)


@pytest.mark.slow
def test_no_styles_are_sent_in_the_closing_round_nor_where_nothing_is_measured(lab):
    loop = lab.run(config(2, hidden=(8,), first=3))
    assert not any(sent_styles(loop, number) for number in (1, 2, 3))
    alone = lab.run(config(3, hidden=(8,), rho=1.0))
    assert not any(sent_styles(alone, number) for number in (1, 2, 3, 4))
    assert "resfim.measured" not in alone.state.values


def test_the_record_of_who_measured_is_kept_in_order_and_only_grows():
    state = State(values={"x": 1})
    assert resfim.having_measured(state, []) is state
    after = resfim.having_measured(resfim.having_measured(state, ["b"]), ["a", "b"])
    assert after.values == {"x": 1, "resfim.measured": json.dumps(["a", "b"])}


@pytest.mark.slow
def test_figures_of_a_round_are_those_of_the_masks_that_came(lab):
    loop = lab.start(config(3, hidden=(8,), rho=0.3))
    first = loop.server.begin(loop.state, loop.context(1))
    assert loop.server.figures(loop.state, first, loop.context(1)) == {}
    advance(loop, 2)
    kept = []
    begin = loop.server.begin
    loop.server.begin = lambda *args: kept.append(begin(*args)) or kept[-1]
    state = loop.round(3)
    told = loop.server.figures(state, kept[0], loop.context(3))
    masks = {alias: loop.states[alias][3].part("mask") for alias in lab.aliases}
    assert told["sites"] == list(lab.aliases)
    assert told["tensors"] == list(masks["a"])
    for row, mask in zip(told["by_tensor"], masks.values(), strict=True):
        assert row == [round(float(part.double().mean()), 4) for part in mask.values()]
    together = sum(torch.cat([part.reshape(-1) for part in mask.values()]).long() for mask in masks.values())
    assert told["holders"] == together.bincount(minlength=4).tolist()


@pytest.mark.parametrize("params", [{"soft": True}, {"aggregate": "all"}, {"rho": 0.0}])
def test_nothing_is_told_where_no_masks_travel(lab, params):
    loop = lab.start(config(2, hidden=(8,), **params))
    acc = loop.server.begin(loop.state, loop.context(2))
    assert isinstance(acc, Accumulator)
    assert loop.server.figures(loop.state, acc, loop.context(2)) == {}


@pytest.mark.slow
def test_a_late_site_resumes_to_the_bit_and_figures_are_events(tmp_path):
    three = Federation(tmp_path)
    settings = config(4, hidden=(8,), freeze_after=2)

    def lose(alias, number, parts):
        return None if alias == "beta" and number == 2 else parts

    whole = three.start(settings, home="whole", link=MemoryLink(three.open_sites("whole"), tamper=lose))
    whole.execute()
    cut = three.start(settings, home="cut", link=MemoryLink(three.open_sites("cut"), tamper=lose))
    for number in (1, 2):
        cut.state = cut.round(number)
        cut.checkpoints.write(number, cut.state)
    cut.round(3)
    resumed = three.start(settings, home="cut", link=MemoryLink(three.open_sites("cut"), tamper=lose))
    assert resumed.resume()
    resumed.execute()
    assert tensor_bytes(resumed.state.tensors) == tensor_bytes(whole.state.tensors)
    assert resumed.state.values == whole.state.values
    assert resfim.measured(whole.state) == {"alpha", "beta", "gamma"}
    told = {event["round"]: event for event in three.events("whole") if event["event"] == "method.figures"}
    assert set(told) == {2, 3, 4}
    assert [told[number]["figures"]["sites"] for number in (2, 3)] == [
        ["alpha", "gamma"],
        ["alpha", "beta", "gamma"],
    ]
    assert all(share > 0 for share in told[3]["figures"]["density"])
    assert told[3]["method"] == "pfl-resfim"
