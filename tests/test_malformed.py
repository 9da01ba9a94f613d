"""Malformed messages at both ends, and malformed configurations: refused by name, and nothing else changes.

Every case is made by a mutator (tests/mutations.py) from a real message of a real round, with its index as the seed:
a failing case is repeated by its test id.
"""

import hashlib
import io
import json
from pathlib import Path

import pytest

from client.site_config import read_site_config
from client.worker import failure
from common import errors
from common.config import RunConfig
from common.errors import ConfigError, MismatchError, QuorumError, WardroundError
from common.events import EventLog
from common.frames import from_frames, to_frames
from common.store import tensor_bytes
from common.wire import decode
from server.link import Answer
from tests.harness import Federation, table_config
from tests.mutations_config import RUN, RUNS, SITES, TOML, spoil_config
from tests.mutations_message import DOWN, UP, spoil

ANSWERS, DOWNS, RUN_CONFIGS, SITE_CONFIGS = 200, 200, 60, 40
ROUND = 2
SPOILT = "beta"
CODES = {
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, WardroundError)
}
NAMED = CODES - {WardroundError.code}
OWN_FILES = ("events", "ledger.")  # these grow by design


def seeds(mutators, count):
    """Every seed; those after the first turn through all mutators are slow."""
    return [
        pytest.param(index, marks=[pytest.mark.slow] if index >= len(mutators) else [])
        for index in range(count)
    ]


class Replay:
    """A link whose sites have one answer ready: the parts, or None for a site that is gone."""

    def __init__(self, aliases, answers):
        self.aliases, self.answers, self.open = list(aliases), answers, {}

    def nodes(self):
        return list(range(1, len(self.aliases) + 1))

    def ask(self, node, parts, *, phase, round, ttl):
        ticket = f"t{len(self.open)}-{node}-{id(parts)}"
        self.open[ticket] = self.aliases[node - 1]
        return ticket

    def poll(self, tickets):
        found = [
            (ticket, self.answers[self.open.pop(ticket)]) for ticket in list(tickets) if ticket in self.open
        ]
        return [Answer(ticket, parts, error="" if parts else "the site is gone") for ticket, parts in found]


def bits(state):
    return tensor_bytes(state.tensors) + repr(sorted(state.values.items())).encode()


class Recorded:
    """Round 2 of a federation of three, recorded, and played again with other answers."""

    def __init__(self, folder: Path):
        self.federation = Federation(folder)
        self.loop = self.federation.start(table_config())
        self.link = self.federation.link
        self.loop.state = self.loop.round(1)
        self.link.seen.clear()
        self.whole = bits(self.loop.round(ROUND))
        self.down = {alias: down for alias, _, down, _ in self.link.seen}
        self.answers = {alias: answer for alias, _, _, answer in self.link.seen}
        self.before = bits(self.loop.state)
        self.without = bits(self.play({SPOILT: None})[0])

    def play(self, changed):
        """Play the round with some answers changed; return its state and its events."""
        stream = io.StringIO()
        loop = self.loop
        loop.link = Replay(loop.roster.nodes, self.answers | changed)
        loop.events = EventLog(None, "server", stream=stream)
        loop._absent = set()
        try:
            return loop.round(ROUND), [json.loads(line) for line in stream.getvalue().splitlines()]
        except QuorumError as error:
            return error, [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return Recorded(tmp_path_factory.mktemp("malformed"))


def failures(events):
    return [event for event in events if event["event"] == "site.failed"]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_the_recorded_round_is_a_round_and_a_missing_site_makes_a_difference(recorded):
    """Without this, the tests below could pass on a round that ignores its sites."""
    state, events = recorded.play({})
    assert bits(state) == recorded.whole
    assert not failures(events)
    assert len({recorded.whole, recorded.without, recorded.before}) == 3
    assert len(UP) + len(DOWN) > 70
    assert min(ANSWERS, DOWNS) >= 4 * max(len(UP), len(DOWN))


@pytest.mark.parametrize("index", seeds(UP, ANSWERS))
def test_a_malformed_answer_is_refused_by_name_and_counts_as_missing(recorded, index):
    name, answer = spoil(UP, index, recorded.answers[SPOILT])
    state, events = recorded.play({SPOILT: answer})
    assert bits(state) == recorded.without, name
    assert bits(recorded.loop.state) == recorded.before, name
    (event,) = failures(events)
    assert (event["site"], event["round"]) == (SPOILT, ROUND), name
    assert event["code"] in NAMED, (name, event)
    assert SPOILT in event["message"], (name, event)
    assert 10 < len(event["message"]) < 1000, (name, event)
    assert event["message"].isprintable(), (name, event)
    told = {item["event"] for item in events if item.get("site") == SPOILT}
    assert not told & {"site.reply", "metric"}, name
    (end,) = [item for item in events if item["event"] == "round.end"]
    assert (sorted(end["sites"]), end["missing"]) == (["alpha", "gamma"], [SPOILT]), name


@pytest.mark.parametrize("index", seeds(range(6), 20))
def test_a_round_of_malformed_answers_only_is_no_round(recorded, index):
    sites = list(recorded.answers)
    spoilt = {
        alias: spoil(UP, 1000 + 7 * index + 11 * place, recorded.answers[alias])
        for place, alias in enumerate(sites)
    }
    error, events = recorded.play({alias: parts for alias, (_, parts) in spoilt.items()})
    assert isinstance(error, QuorumError), spoilt
    assert f"Round {ROUND}: 0 sites contributed, 2 are needed." in str(error)
    assert {event["site"] for event in failures(events)} == set(sites)
    assert {event["code"] for event in failures(events)} <= NAMED
    assert bits(recorded.loop.state) == recorded.before
    assert bits(recorded.play({})[0]) == recorded.whole  # and the round can be asked again


# ---- messages to a site ----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file that a refused message must leave alone."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(OWN_FILES)
    }


@pytest.mark.parametrize("index", seeds(DOWN, DOWNS))
def test_a_malformed_message_is_refused_by_the_site_and_changes_nothing_there(recorded, index):
    site, home = recorded.link.sites[SPOILT], recorded.federation.root / "home" / SPOILT
    before = contents(home)
    assert any("round-" in name or "state" in name for name in before)
    name, message = spoil(DOWN, index, recorded.down[SPOILT])
    with pytest.raises(WardroundError) as caught:
        site.handle(message, lambda: None)
    assert caught.value.code in NAMED, (name, caught.value)
    assert 10 < len(str(caught.value)) < 1000, (name, caught.value)
    assert contents(home) == before, name
    answer = decode(failure(caught.value, SPOILT))  # what would travel back
    assert answer.failure
    assert answer.failure[1].isprintable(), name


def test_after_all_that_the_site_still_gives_the_same_answer(recorded):
    for index in range(0, DOWNS, 7):
        with pytest.raises(WardroundError):
            recorded.link.sites[SPOILT].handle(spoil(DOWN, index, recorded.down[SPOILT])[1], lambda: None)
    again = recorded.link.sites[SPOILT].handle(recorded.down[SPOILT], lambda: None)
    first = recorded.answers[SPOILT]
    assert again["p.model"] == first["p.model"]
    assert again["metrics"] == first["metrics"]


# ---- frames between relay and worker ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\x1b[2J\n", "x" * 5000, "\u202ename"])
@pytest.mark.parametrize("fault", ["twice", "short", "long"])
def test_a_broken_stream_is_refused_in_a_sentence_that_cannot_steer_a_terminal(name, fault):
    frames = list(to_frames({name: b"12345"}))
    if fault == "twice":
        frames += frames
    elif fault == "short":
        frames[0].part.nbytes = 9
    else:
        frames[0].part.nbytes = 2
    with pytest.raises(WardroundError) as caught:
        from_frames(frames)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


# ---- configurations --------------------------------------------------------------------------------------------------


def check_refusal(error, said, name):
    sentence = str(error)
    assert any(words in sentence for words in said), (name, sentence[:300])
    assert 20 < len(sentence) < 1000, (name, sentence[:300])
    assert "pydantic" not in sentence, name
    assert "Traceback" not in sentence, name
    assert sentence.endswith("."), (name, sentence[:300])


@pytest.mark.parametrize("index", seeds(RUNS, RUN_CONFIGS))
def test_a_malformed_run_configuration_is_refused_by_key(index):
    name, text, said = spoil_config(RUNS, index)
    with pytest.raises((ConfigError, MismatchError)) as caught:
        RunConfig.from_json(text)
    check_refusal(caught.value, said, name)


@pytest.mark.parametrize("index", seeds(SITES, SITE_CONFIGS))
def test_a_malformed_site_configuration_is_refused_by_key(tmp_path, index):
    name, text, said = spoil_config(SITES, index)
    path = tmp_path / "JANE_DOE" / "site.toml"
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_site_config(path)
    check_refusal(caught.value, said, name)
    assert "JANE_DOE" not in str(caught.value)


def test_the_documents_that_are_spoilt_are_good_ones(tmp_path):
    RunConfig.from_json(json.dumps(RUN.make()))
    (tmp_path / "site.toml").write_text(TOML.dump(TOML.make()))
    assert read_site_config(tmp_path / "site.toml").alias == "hospital-1"
