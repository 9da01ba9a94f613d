"""Conformance: what every registered method must do, through wire bytes, on real sites and the real round loop."""

import pytest
import torch

from common.config import RunConfig
from common.errors import QuorumError
from common.method import GLOBAL, PERSONAL
from common.methods import METHODS
from common.payload import Payload, State
from common.store import tensor_bytes
from common.wire import decode, encode
from tests.harness import SILENT, Federation, MemoryLink, table_config

pytestmark = pytest.mark.slow

ALL = sorted(METHODS)
SENDING = [name for name in ALL if METHODS[name].server.uplink]
LIKE_MODEL = [name for name in SENDING if any(spec.like_model for spec in METHODS[name].server.uplink)]


def state_bytes(state: State) -> bytes:
    return tensor_bytes(state.tensors) + repr(sorted(state.values.items())).encode()


def best_models(federation: Federation, loop, home: str = "home") -> dict[str, bytes]:
    """Return every hospital's own final model: personal where the method is, else the global one."""
    personal = federation.personal(home)
    if personal:
        return {alias: tensor_bytes(model) for alias, model in personal.items()}
    model = tensor_bytes(loop.server.model(loop.state))
    return dict.fromkeys(federation.aliases, model)


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_runs_to_the_end_and_every_case_is_accounted_for(federation, name):
    loop = federation.run(table_config(name))
    ends = [event for event in federation.events() if event["event"] == "round.end"]
    assert [event["round"] for event in ends] == [1, 2, 3, 4]
    assert all(
        sorted(event["cases"]) == sorted(federation.aliases) and not event["missing"] for event in ends
    )
    assert loop.done == 3
    kinds = {item.model for sets in loop.history[-1].metrics.values() for item in sets}
    assert kinds <= {GLOBAL, PERSONAL}
    assert (PERSONAL in kinds) == METHODS[name].personal


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_bytes_and_another_seed_other_bytes(federation, name):
    first = best_models(federation, federation.run(table_config(name), home="a"), "a")
    again = best_models(federation, federation.run(table_config(name), home="b"), "b")
    other = best_models(federation, federation.run(table_config(name, seed=8), home="c"), "c")
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ALL)
def test_order_of_replies_changes_no_bit(federation, name):
    forth = federation.run(table_config(name), home="a")
    back = federation.run(
        table_config(name), home="b", link=MemoryLink(federation.open_sites("b"), backwards=True)
    )
    assert state_bytes(forth.state) == state_bytes(back.state)
    assert best_models(federation, forth, "a") == best_models(federation, back, "b")


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].equals])
def test_neutral_parameters_equal_the_named_method_to_the_bit(federation, name):
    method = METHODS[name]
    neutral = federation.run(table_config(name, **method.neutral), home="a")
    named = federation.run(table_config(method.equals), home="b")
    assert best_models(federation, neutral, "a") == best_models(federation, named, "b")


@pytest.mark.parametrize("name", ALL)
def test_one_site_with_neutral_parameters_is_local_training(tmp_path, name):
    alone = Federation(tmp_path, ("alpha",))
    local = best_models(alone, alone.run(table_config("local-only"), home="local"), "local")
    ours = best_models(alone, alone.run(table_config(name, **METHODS[name].neutral), home="ours"), "ours")
    assert ours == local


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stop", [1, 2])
def test_resume_at_a_round_equals_the_uninterrupted_run(federation, name, stop):
    whole = federation.run(table_config(name), home="whole")
    cut = federation.start(table_config(name), home="cut")
    for number in range(1, stop + 1):
        cut.state = cut.round(number)
        cut.checkpoints.write(number, cut.state)
    if stop == 1:  # a round that was answered but never closed: the sites are ahead of the coordinator
        cut.round(2)
    resumed = federation.start(table_config(name), home="cut")
    assert resumed.resume()
    assert resumed.done == stop
    resumed.execute()
    assert state_bytes(resumed.state) == state_bytes(whole.state)
    assert best_models(federation, resumed, "cut") == best_models(federation, whole, "whole")


@pytest.mark.parametrize("name", ALL)
def test_a_first_round_asked_again_starts_from_the_beginning(federation, name):
    kept = {"keep": ["head"]} if name == "fedbn" else {}  # the tables' network has no normalisation to keep
    loop = federation.start(table_config(name, **kept))
    once = loop.round(1)
    states = {
        alias: state_bytes(site._session.states.before(2)) for alias, site in federation.link.sites.items()
    }
    again = loop.round(1)
    assert state_bytes(once) == state_bytes(again)
    assert states == {
        alias: state_bytes(site._session.states.before(2)) for alias, site in federation.link.sites.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_a_missing_site_is_named_and_the_round_goes_on(federation, name):
    def lose(alias, round_, parts):
        return None if alias == "beta" and round_ == 2 else parts

    loop = federation.run(table_config(name), link=MemoryLink(federation.open_sites(), tamper=lose))
    assert loop.done == 3
    failed = [event for event in federation.events() if event["event"] == "site.failed"]
    assert [(event["site"], event["round"], event["code"]) for event in failed] == [("beta", 2, "transport")]
    assert "beta" not in loop.history[1].cases


def test_a_silent_site_is_waited_for_until_the_deadline_and_then_named(federation):
    def silence(alias, round_, parts):
        return SILENT if alias == "beta" and round_ == 2 else parts

    config = table_config()
    config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"deadline": 0.8})})
    loop = federation.run(config, link=MemoryLink(federation.open_sites(), tamper=silence))
    assert loop.done == 3
    failed = [event for event in federation.events() if event["event"] == "site.failed"]
    assert [(event["site"], event["round"], event["code"]) for event in failed] == [("beta", 2, "deadline")]
    assert loop.history[1].seconds >= 0.8


def spoil(federation, name, change):
    """Run with a tampered beta in round 2 and a full quorum: the round must fail by name, the state stay untouched."""

    def tamper(alias, round_, parts):
        if alias != "beta" or round_ != 2:
            return parts
        envelope = decode(parts)
        change(envelope)
        return encode(envelope)

    config = table_config(name)
    config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"quorum": 1.0})})
    loop = federation.start(config, link=MemoryLink(federation.open_sites(), tamper=tamper))
    loop.state = loop.round(1)
    before = state_bytes(loop.state)
    with pytest.raises(QuorumError, match="beta") as caught:
        loop.round(2)
    assert state_bytes(loop.state) == before
    return str(caught.value)


def first_payload(envelope) -> Payload:
    return envelope.payloads[sorted(envelope.payloads)[0]]


@pytest.mark.parametrize("name", SENDING)
def test_a_nan_is_refused_and_the_state_untouched(federation, name):
    def change(envelope):
        tensors = first_payload(envelope).tensors
        key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
        tensors[key] = torch.full_like(tensors[key], float("nan"))

    assert "not finite" in spoil(federation, name, change)


@pytest.mark.parametrize("name", LIKE_MODEL)
def test_a_wrong_shape_is_refused_with_both_shapes(federation, name):
    def change(envelope):
        tensors = first_payload(envelope).tensors
        key = next(iter(tensors))
        tensors[key] = tensors[key].reshape(-1)[:1]

    assert "expected (" in spoil(federation, name, change)


@pytest.mark.parametrize("name", SENDING)
def test_a_missing_payload_is_refused(federation, name):
    assert "missing" in spoil(federation, name, lambda envelope: envelope.payloads.clear())


@pytest.mark.parametrize("name", ALL)
def test_zero_cases_are_refused(federation, name):
    def change(envelope):
        envelope.cases = 0

    assert "no training case" in spoil(federation, name, change)


def test_more_cases_than_declared_are_refused(federation):
    def change(envelope):
        envelope.cases += 1

    assert "its first answer said" in spoil(federation, "fedavg", change)


def test_markup_in_a_figures_name_is_refused(federation):
    def change(envelope):
        envelope.metrics[0].sums["<script>"] = (1.0, 1.0)

    assert "no plain word" in spoil(federation, "fedavg", change)


def test_the_model_is_saved_even_if_a_site_misses_the_closing_evaluation(federation):
    def lose(alias, round_, parts):
        return None if alias == "beta" and round_ == 4 else parts

    config = table_config()
    config = config.model_copy(
        update={"rounds": config.rounds.model_copy(update={"quorum": 1.0, "deadline": 1.0})}
    )
    loop = federation.start(config, link=MemoryLink(federation.open_sites(), tamper=lose))
    with pytest.raises(QuorumError, match="beta"):
        loop.execute()
    assert (loop.checkpoints.models / "global.safetensors").is_file()


@pytest.mark.parametrize("name", ALL)
def test_a_reply_to_another_round_is_refused(federation, name):
    def change(envelope):
        envelope.round = 1

    assert "asked was round 2" in spoil(federation, name, change)


@pytest.mark.parametrize("name", ALL)
def test_only_declared_kinds_cross_the_border(federation, name):
    federation.run(table_config(name))
    declared = {spec.kind for spec in METHODS[name].server.uplink}
    sent = {
        payload.kind
        for _, round_, _, answer in federation.link.seen
        for payload in decode(answer).payloads.values()
        if round_ > 0
    }
    assert sent == declared


@pytest.mark.parametrize("name", ALL)
def test_parameters_have_ranges_and_words(name):
    params = METHODS[name].params
    assert all(field.description for field in params.model_fields.values())
    assert params() == params.model_validate_json(params().model_dump_json())
    assert RunConfig(method=name).method == name
