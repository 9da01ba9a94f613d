"""What an end once let through, or broke on: one smallest case for each hole that the malformed messages found."""

import json
import threading

import pytest

from client.site_config import read_site_config
from client.worker import Service, failure
from common.config import RunConfig
from common.errors import ConfigError, WardroundError
from common.frames import to_frames
from common.proto import wardround_pb2 as pb
from common.wire import decode
from tests.harness import Federation, MemoryLink, table_config
from tests.mutations import edit
from tests.test_malformed import NAMED, SPOILT, Recorded, bits, failures

CONTROL = "\x1b[2J\n\u202e[red]<b>"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return Recorded(tmp_path_factory.mktemp("holes"))


def answered(recorded, change=lambda header: None, **parts):
    return edit(recorded.answers[SPOILT], change) | parts


def metrics(recorded, change):
    message = pb.Metrics.FromString(recorded.answers[SPOILT]["metrics"])
    change(message)
    return message.SerializeToString(deterministic=True)


def set_sum(numerator, denominator):
    def change(message):
        total = next(iter(message.sets[0].sums.values()))
        total.numerator, total.denominator = numerator, denominator

    return change


# ---- answers that mean nothing ---------------------------------------------------------------------------------------

FIGURES = {
    "sum that is no number": set_sum(float("nan"), 4.0),
    "infinite sum": set_sum(float("inf"), 4.0),
    "infinite denominator": set_sum(1.0, float("inf")),
    "denominator that is no number": set_sum(1.0, float("nan")),
    "negative denominator": set_sum(1.0, -1.0),
    "cases beyond all measure": lambda message: setattr(message.sets[0], "cases", 2**63),
    "figures of another round": lambda message: setattr(message.sets[0], "round", 77),
    "figures twice": lambda message: message.sets.append(message.sets[0]),
}


def assert_refused(recorded, answer):
    state, events = recorded.play({SPOILT: answer})
    assert bits(state) == recorded.without
    (event,) = failures(events)
    assert event["code"] in NAMED
    assert SPOILT in event["message"]


@pytest.mark.parametrize("change", FIGURES.values(), ids=FIGURES)
def test_figures_that_cannot_be_are_refused(recorded, change):
    assert_refused(recorded, answered(recorded, metrics=metrics(recorded, change)))


HEADERS = {
    "infinite loss": lambda header: setattr(header, "loss", float("inf")),
    "negative seconds": lambda header: header.seconds.__setitem__("train", -1e9),
    "seconds that are no number": lambda header: header.seconds.__setitem__("train", float("nan")),
    "infinite seconds": lambda header: header.seconds.__setitem__("train", float("inf")),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_numbers_that_cannot_be_are_refused(recorded, change):
    assert_refused(recorded, answered(recorded, change))


def test_a_first_answer_whose_cases_are_not_those_of_its_summary_is_refused(tmp_path):
    """Its cases are the weight that a site has in the mean, and every later answer is held against them."""

    def boast(alias, round_, parts):
        return (
            edit(parts, lambda header: setattr(header, "cases", 10**12))
            if alias == SPOILT and not round_
            else parts
        )

    federation = Federation(tmp_path)
    loop = federation.start(table_config(), link=MemoryLink(federation.open_sites(), tamper=boast))
    assert SPOILT not in loop.roster.cases
    assert SPOILT in loop.roster.refused


# ---- failures in the other end's words -------------------------------------------------------------------------------


def told(recorded, code, message):
    def change(header):
        header.failure.code, header.failure.message = code, message

    (event,) = failures(recorded.play({SPOILT: answered(recorded, change)})[1])
    return event


@pytest.mark.parametrize("code", ["", "no-such-code", CONTROL, "x" * 5000])
def test_a_failure_code_that_wardround_does_not_have_becomes_one_that_it_has(recorded, code):
    assert told(recorded, code, "beta: cannot.")["code"] in NAMED


def test_a_failures_text_cannot_steer_a_terminal(recorded):
    assert told(recorded, "data", CONTROL)["message"].isprintable()


def test_another_sites_name_in_an_answer_cannot_steer_a_terminal(recorded):
    answer = answered(recorded, lambda header: setattr(header, "site", CONTROL))
    (event,) = failures(recorded.play({SPOILT: answer})[1])
    assert event["message"].isprintable()


def test_a_devices_name_in_the_first_answer_cannot_steer_a_terminal(tmp_path):
    def paint(alias, round_, parts):
        return edit(parts, lambda header: setattr(header, "device", CONTROL)) if not round_ else parts

    federation = Federation(tmp_path)
    federation.run(table_config(rounds=1), link=MemoryLink(federation.open_sites(), tamper=paint))
    devices = {event["device"] for event in federation.events() if event["event"] == "site.ready"}
    assert devices
    assert all(device.isprintable() and "<" not in device for device in devices)


# ---- at the site -----------------------------------------------------------------------------------------------------


def ask(recorded, parts, alias=SPOILT):
    """Ask the worker's own service, as the relay does."""
    service = Service({SPOILT: recorded.link.sites[SPOILT]})
    return decode(service.answer(alias, to_frames(parts), threading.Event()))


def test_a_name_that_is_no_text_is_answered_with_a_failure(recorded):
    parts = recorded.down[SPOILT] | {"config": b'{"method": "\\ud800"}'}
    envelope = ask(recorded, parts)
    assert envelope.failure
    assert envelope.failure[0] in NAMED


def test_a_deep_configuration_is_refused_at_every_depth():
    """Just below the depth at which JSON itself gives up, our own walk over it must not break."""
    for depth in range(850, 1001):
        with pytest.raises(ConfigError):
            RunConfig.from_json('{"train":' + '{"a":' * depth + "1" + "}" * depth + "}")


@pytest.mark.parametrize("where", ["alias = ", "x = "])
def test_a_deep_site_configuration_is_refused(tmp_path, where):
    path = tmp_path / "site.toml"
    path.write_text('data = "/d"\nsocket = "/s"\nhome = "/h"\n' + where + "[" * 600 + "]" * 600 + "\n")
    with pytest.raises(ConfigError):
        read_site_config(path)


@pytest.mark.parametrize("place", ["method", "data.labels", "sites"])
def test_names_with_control_characters_are_refused_in_a_configuration(place):
    document = json.loads(table_config(sites=("alpha",)).to_json())
    home = document
    *sections, leaf = place.split(".")
    for section in sections:
        home = home[section]
    home[leaf] = [CONTROL, "other"] if isinstance(home[leaf], list) else CONTROL
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping(document)
    assert str(caught.value).isprintable()


def test_an_unknown_keys_name_cannot_steer_a_terminal():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping({CONTROL: 1})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "document",
    [
        {"seed": list(range(100_000))},
        {"data": {"task": "x" * 100_000}},
        {"x" * 100_000: 1},
        {"seed": 10**4000},
    ],
    ids=["list", "text", "key", "number"],
)
def test_what_was_got_is_shown_in_few_words(document):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping(document)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("section", "key"),
    [("rounds", "rounds"), ("model", "width"), ("train", "local_epochs"), ("train", "batch_size")],
)
def test_counts_that_no_message_can_carry_are_refused(section, key):
    with pytest.raises(ConfigError):
        RunConfig.from_mapping({section: {key: 2**63}})


def test_a_key_given_twice_in_json_is_refused():
    with pytest.raises(ConfigError):
        RunConfig.from_json('{"seed": 1, "seed": 2}')


def test_a_round_beyond_the_runs_last_is_refused_by_the_site(recorded):
    message = edit(recorded.down[SPOILT], lambda header: setattr(header, "round", 2**32 - 1))
    with pytest.raises(WardroundError):
        recorded.link.sites[SPOILT].handle(message, lambda: None)


def test_an_error_in_any_text_can_be_told():
    for text in ("\ud800", CONTROL, "x" * 10**6, "\0"):
        envelope = decode(failure(ConfigError(f"alpha: {text}"), "alpha"))
        assert envelope.failure
