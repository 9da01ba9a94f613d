"""The round loop when something is broken: checkpoints, absurd updates, sites that come and go. In process, real sites."""

import json

import pytest
import torch

from common.config import GuardConfig
from common.errors import ConfigError, PayloadError, QuorumError
from common.wire import decode, encode
from server.checkpoint import Checkpoints
from tests.harness import Federation, MemoryLink, table_config

pytestmark = pytest.mark.slow

ROUNDS = 4


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


def config(method="ditto", *, rounds=ROUNDS, guard=None, **more):
    found = table_config(method, rounds=rounds)
    update = {"rounds": found.rounds.model_copy(update=more)}
    if guard:
        update["guard"] = GuardConfig(**guard)
    return found.model_copy(update=update)


def bytes_of(tensors):
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def begin(federation, settings, rounds, home="home", **options):
    """Start a run as the ServerApp does and complete some rounds."""
    loop = federation.start(settings, home=home, **options)
    loop.resume()
    for number in range(loop.done + 1, rounds + 1):
        loop.state = loop.round(number)
        loop.done = number
        loop._save(number)
    return loop


def spoil_checkpoint(federation, number, home="home"):
    path = federation.root / f"{home}-server" / "checkpoints" / f"round-{number:06d}" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_spoilt_checkpoint_costs_one_round_and_changes_nothing(federation):
    whole = federation.run(config(), home="whole")
    cut = begin(federation, config(), 3, home="cut")
    cut.round(4)  # the sites are a round ahead when the coordinator dies
    spoil_checkpoint(federation, 3, "cut")
    resumed = federation.start(config(), home="cut")
    assert resumed.resume()
    assert resumed.done == 2
    resumed.execute()
    assert bytes_of(resumed.state.tensors) == bytes_of(whole.state.tensors)
    assert {alias: bytes_of(model) for alias, model in federation.personal("cut").items()} == {
        alias: bytes_of(model) for alias, model in federation.personal("whole").items()
    }
    events = federation.events("cut")
    assert [
        (event["round"], event["code"]) for event in events if event["event"] == "checkpoint.refused"
    ] == [(3, "payload")]
    assert [(event["round"], event["attempt"]) for event in events if event["event"] == "run.resume"] == [
        (2, 1)
    ]


def test_no_readable_checkpoint_is_a_named_end_and_not_a_new_beginning(federation):
    begin(federation, config(), 3)
    for number in (2, 3):
        spoil_checkpoint(federation, number)
    loop = federation.start(config())
    with pytest.raises(PayloadError, match=r"None of the checkpoints \(rounds 2, 3\) can be read"):
        loop.resume()


def test_a_run_killed_in_its_first_round_begins_again(federation):
    whole = federation.run(config(), home="whole")
    begin(federation, config(), 0, home="cut").round(1)
    resumed = federation.start(config(), home="cut")
    assert resumed.resume()
    assert resumed.done == 0
    resumed.execute()
    assert bytes_of(resumed.state.tensors) == bytes_of(whole.state.tensors)


def test_a_run_killed_before_its_closing_evaluation_only_closes(federation):
    whole = federation.run(config(), home="whole")
    begin(federation, config(), ROUNDS, home="cut")
    resumed = federation.start(config(), home="cut")
    assert resumed.resume()
    resumed.execute()
    assert [log.number for log in resumed.history] == [ROUNDS + 1]
    assert bytes_of(resumed.state.tensors) == bytes_of(whole.state.tensors)


def test_a_run_does_not_continue_with_another_configuration(federation):
    begin(federation, config(), 2)
    loop = federation.start(config(rounds=ROUNDS + 1))
    with pytest.raises(ConfigError, match=r"rounds.rounds was 4, is 5"):
        loop.resume()


def test_attempts_are_counted_and_a_spoilt_note_is_refused(federation):
    for attempt in range(3):
        loop = federation.start(config())
        assert loop.resume() == (attempt > 0)
    note = federation.root / "home-server" / "checkpoints" / "run.json"
    assert json.loads(note.read_text())["attempts"] == 2
    note.write_text("{")
    with pytest.raises(PayloadError, match="note beside the checkpoints"):
        federation.start(config()).resume()
    assert Checkpoints(federation.root / "home-server").begun()


# ---- what a site sends ----------------------------------------------------------------------------------------------


def changing(federation, change, alias="beta", round_=2):
    def tamper(site, number, parts):
        if (site, number) != (alias, round_):
            return parts
        envelope = decode(parts)
        tensors = envelope.payloads["model"].tensors
        envelope.payloads["model"].tensors = {
            name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
        return encode(envelope)

    return MemoryLink(federation.open_sites(), tamper=tamper)


def without(federation, alias="beta", round_=2, home="without"):
    """Run the same with the site missing in that round: what a refused update must equal."""

    def lose(site, number, parts):
        return None if (site, number) == (alias, round_) else parts

    return federation.run(
        config("fedavg"), home=home, link=MemoryLink(federation.open_sites(home), tamper=lose)
    )


@pytest.mark.parametrize(
    ("change", "guard", "named"),
    [
        (lambda tensor: tensor * float("nan"), {}, "not finite"),
        (lambda tensor: tensor + 1e4, {}, "update_ratio"),
        (lambda tensor: tensor + 1e8, {"update_ratio": 0}, "rms"),
        (lambda tensor: tensor + 50, {"update_norm": 20}, "update_norm"),
        (lambda tensor: tensor + 50, {"outlier": 5.0, "update_ratio": 0}, "outlier"),
    ],
)  # fmt: skip
def test_an_absurd_update_never_reaches_the_global_model(federation, change, guard, named):
    expected = without(federation)
    loop = federation.run(config("fedavg", guard=guard), link=changing(federation, change))
    assert bytes_of(loop.state.tensors) == bytes_of(expected.state.tensors)
    failed = [event for event in federation.events() if event["event"] == "site.failed"]
    assert [(event["site"], event["round"], event["code"]) for event in failed] == [("beta", 2, "payload")]
    assert named in failed[0]["message"]
    assert "beta" not in loop.history[1].cases


@pytest.mark.parametrize("reduce", ["median", "trimmed-mean"])
def test_a_robust_reduction_bounds_what_one_site_can_do(federation, reduce):
    guard = {"reduce": reduce, "trim": 0.34, "update_ratio": 0}
    honest = federation.run(config("fedavg", guard=guard), home="honest")
    loop = federation.run(
        config("fedavg", guard=guard), link=changing(federation, lambda tensor: tensor + 1e4)
    )
    gap = max(
        float((loop.state.tensors[name] - tensor).abs().max())
        for name, tensor in honest.state.tensors.items()
    )
    assert gap < 3.0


def test_a_result_that_is_not_finite_ends_the_run_and_leaves_the_state(federation):
    loop = federation.start(
        config("fedavg", guard={"update_ratio": 0, "rms": 0}),
        link=changing(federation, lambda tensor: torch.full_like(tensor, 3e38)),
    )
    loop.state = loop.round(1)
    before = bytes_of(loop.state.tensors)
    loop.server.update = lambda state, reduced, ctx: state.having(
        "model", {key: (value * 1e9).to(torch.float32) for key, value in reduced["model"].items()}
    )
    with pytest.raises(PayloadError, match="Round 2"):
        loop.round(2)
    assert bytes_of(loop.state.tensors) == before


# ---- sites that come and go -----------------------------------------------------------------------------------------


class Hiding(MemoryLink):
    """A link on which some sites are not connected until a round has begun."""

    hidden: frozenset[str] = frozenset()

    def nodes(self):
        return [number for number, alias in enumerate(self.sites, 1) if alias not in self.hidden]


def test_a_site_that_comes_later_takes_part_from_then_on(federation):
    link = Hiding(federation.open_sites())
    link.hidden = frozenset({"beta"})
    loop = federation.start(config("fedavg", ready_timeout=0.3), link=link)
    loop.state = loop.round(1)
    assert list(loop.history[0].cases) == ["alpha", "gamma"]
    assert loop.history[0].missing["beta"][0] == "transport"
    link.hidden = frozenset()
    loop.round(2)  # it is asked who it is
    loop.round(3)
    assert list(loop.history[2].cases) == ["alpha", "beta", "gamma"]
    assert [event["site"] for event in federation.events() if event["event"] == "site.joined"] == ["beta"]


def test_a_site_that_returns_continues_from_its_own_state(federation):
    """It misses a round in the middle; its personal model goes on from where it was."""

    def lose(site, number, parts):
        return None if (site, number) == ("beta", 2) else parts

    asked = []
    link = MemoryLink(federation.open_sites(), tamper=lose)
    loop = federation.start(config(retries=0), link=link)
    for number in (1, 2, 3):
        loop.state = loop.round(number)
        asked.append(link.sites["beta"]._session.states.rounds())
    assert "beta" not in loop.history[1].cases
    assert "beta" in loop.history[2].cases
    assert asked[-1] == [1, 2, 3]  # its work of round 2 was done, only the answer got lost


def test_a_run_without_its_quorum_ends_by_name(federation):
    def lose(site, number, parts):
        return None if site in ("alpha", "beta") and number == 2 else parts

    link = MemoryLink(federation.open_sites(), tamper=lose)
    loop = federation.start(config("fedavg", quorum=0.5), link=link)
    loop.state = loop.round(1)  # with time enough: the first round of a process imports what it needs
    soon = loop.config.rounds.model_copy(update={"deadline": 2.0})
    loop.config = loop.config.model_copy(update={"rounds": soon})
    with pytest.raises(QuorumError, match="Round 2: 1 sites contributed, 2 are needed") as caught:
        loop.round(2)
    assert "alpha" in str(caught.value)  # in whatever order a busy machine finds them missing
    assert "beta" in str(caught.value)
