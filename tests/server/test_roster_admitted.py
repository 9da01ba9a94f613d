"""A node is held to the site that its key was admitted for: nobody takes another hospital's name."""

import json
import os
import threading
import time

import pytest

from common.config import RunConfig
from common.errors import MismatchError, QuorumError, StorageError
from common.events import EventLog, read_events
from server import roster as module
from server.admitted import NODES_FILE, Admitted, write_nodes
from server.link import Answer
from server.roster import RosterCall
from tests.harness import Federation, MemoryLink, table_config
from tests.server.test_roster import VERSIONS, FakeLink, broken, failing, ready

NODES = {11: "oak", 12: "elm"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.03)


@pytest.fixture
def bench(tmp_path):
    """Returns a call over scripted nodes; the list lies in the run folder as the coordinator writes it."""

    def make(scripts, nodes=NODES, sites=("oak", "elm"), quorum=0.5, wait=0.2):
        if nodes is not None:
            write_nodes(tmp_path, nodes)
        rounds = {"quorum": quorum, "ready_timeout": wait, "poll": 0.002}
        config = RunConfig.from_mapping({"sites": sites, "rounds": rounds})
        make.link = FakeLink(scripts)
        log = EventLog(tmp_path / "events.jsonl", "server")
        return RosterCall(make.link, "run", config, log, VERSIONS, Admitted(tmp_path))

    make.folder = tmp_path
    make.told = lambda name: [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == name]
    return make


def test_sites_that_say_who_they_are_take_part(bench):
    assert bench({11: ready("oak"), 12: ready("elm")}).collect().nodes == {"oak": 11, "elm": 12}


def test_a_site_that_says_it_is_another_is_refused_by_its_own_name(bench):
    roster = bench({11: ready("elm"), 12: ready("elm")}).collect()
    assert roster.nodes == {"elm": 12}  # whoever answers first: the name is its owner's
    code, sentence = roster.refused["oak"]
    assert code == "credential"
    assert sentence.startswith("oak: says it is 'elm', but its key was approved for 'oak'")
    assert [event["site"] for event in bench.told("site.refused")] == ["oak"]


def test_it_is_refused_alone_and_under_an_alias_that_nobody_has_too(bench):
    call = bench({11: ready("x" * 100 + "\n")}, sites=("oak",))
    with pytest.raises(MismatchError, match="oak: says it is 'xxx") as caught:
        call.collect()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_a_failure_is_told_under_the_name_that_the_key_has(bench):
    call = bench({11: failing("elm", "data", "elm: case 3 is broken."), 12: ready("elm")})
    roster = call.collect()
    assert roster.nodes == {"elm": 12}
    assert roster.refused.keys() == {"oak"}


def test_a_site_whose_relay_breaks_is_named_though_it_never_said_a_word(bench):
    with pytest.raises(QuorumError, match="oak: the site's relay process ended hard"):
        bench({11: broken()}, nodes={11: "oak"}, sites=("oak",), wait=0.1).collect()


def test_who_is_not_admitted_or_not_of_this_run_is_not_even_asked(bench):
    call = bench(
        {11: ready("oak"), 12: ready("elm"), 13: ready("ash"), 14: ready("oak")}, nodes=NODES | {13: "ash"}
    )
    assert call.collect().nodes == {"oak": 11, "elm": 12}
    call.look()
    assert sorted(bench.link.asked) == [11, 12]
    (warning,) = bench.told("warning")  # once, however often it is seen; ash is admitted, to another run
    assert warning["code"] == "credential"
    assert warning["message"].startswith("node-0014: is connected with a key that is not admitted")


def test_a_site_that_is_approved_later_joins(bench):
    call = bench({11: ready("oak"), 12: ready("elm")}, nodes={11: "oak"})
    roster = call.collect()
    assert list(roster.nodes) == ["oak"]
    write_nodes(bench.folder, NODES)
    assert call.look() == ["elm"]
    assert roster.nodes == {"oak": 11, "elm": 12}


def test_a_revoked_site_leaves_the_roster_and_comes_back_with_a_new_key(bench):
    call = bench({11: ready("oak"), 12: ready("elm"), 15: ready("elm")})
    roster = call.collect()
    write_nodes(bench.folder, {11: "oak"})
    assert call.revoked("oak") is None
    assert call.revoked("elm")[0] == "credential"
    assert call.dismiss() == ["elm"]
    assert call.dismiss() == []
    assert roster.nodes == {"oak": 11}
    assert roster.refused["elm"][0] == "credential"
    assert call.look() == []
    write_nodes(bench.folder, {11: "oak", 15: "elm"})
    assert call.look() == ["elm"]
    assert roster.nodes == {"oak": 11, "elm": 15}
    assert not roster.refused


def test_a_site_that_was_revoked_before_a_run_goes_on_is_not_waited_for(bench):
    call = bench({11: ready("oak")}, nodes={11: "oak"}, wait=30.0)
    begun = time.monotonic()
    roster = call.collect()
    assert time.monotonic() - begun < 10
    assert roster.nodes == {"oak": 11}
    assert roster.refused["elm"] == (
        "credential",
        "elm: its key is not admitted any more; the site is not waited for.",
    )
    with pytest.raises(MismatchError, match="elm: its key is not admitted"):
        bench({11: ready("oak")}, nodes={11: "oak"}, wait=30.0, quorum=1.0).collect()


def test_an_answer_that_is_under_way_when_its_key_is_revoked_counts_for_nothing(bench):
    call = bench({11: ready("oak")}, sites=("oak",))
    call._ask_new(1e12)
    write_nodes(bench.folder, {12: "elm"})
    ticket = next(iter(call._tickets))
    parts = bench.link.open[ticket]
    call._take(Answer(ticket, parts))
    assert not call.roster.nodes


@pytest.mark.parametrize("lost", [False, True])
def test_a_site_that_is_revoked_in_the_middle_of_a_round_is_out_at_once(tmp_path, lost):
    """Also where the quorum needs it: asking a revoked site until the deadline would hold up everybody."""
    federation = Federation(tmp_path)
    folder = tmp_path / "home-server"
    write_nodes(folder, {1: "alpha", 2: "beta", 3: "gamma"})

    def revoke(site, number, parts):
        if (site, number) != ("beta", 2):
            return parts
        write_nodes(folder, {1: "alpha", 3: "gamma"})
        return None if lost else parts  # an answer that was on its way counts no more than one that got lost

    link = MemoryLink(federation.open_sites(), tamper=revoke)
    settings = table_config("fedavg", rounds=4)
    rounds = settings.rounds.model_copy(update={"quorum": 1.0})
    loop = federation.start(settings.model_copy(update={"rounds": rounds}), link=link)
    loop.state = loop.round(1)
    assert list(loop.history[0].cases) == ["alpha", "beta", "gamma"]
    with pytest.raises(QuorumError, match="beta: its key is not admitted any more"):
        loop.round(2)
    assert loop.history[1].seconds < 10
    assert loop.history[1].missing["beta"][0] == "credential"
    assert len([seen for seen in link.seen if seen[:2] == ("beta", 2)]) == 1
    with pytest.raises(QuorumError):
        loop.round(3)
    assert not [seen for seen in link.seen if seen[:2] == ("beta", 3)]


def test_a_revoked_site_that_flower_takes_no_message_for_is_not_asked_until_the_deadline(tmp_path):
    federation = Federation(tmp_path)
    folder = tmp_path / "home-server"
    write_nodes(folder, {1: "alpha", 2: "beta", 3: "gamma"})

    class Refusing(MemoryLink):
        """As Flower: no ticket for a node that is not registered any more."""

        def ask(self, node, parts, **named):
            gone = node == 2 and named["round"] == 2
            if gone:
                write_nodes(folder, {1: "alpha", 3: "gamma"})
            return "" if gone else super().ask(node, parts, **named)

    settings = table_config("fedavg", rounds=4)
    rounds = settings.rounds.model_copy(update={"quorum": 1.0, "deadline": 600.0})
    link = Refusing(federation.open_sites())
    loop = federation.start(settings.model_copy(update={"rounds": rounds}), link=link)
    loop.state = loop.round(1)
    with pytest.raises(QuorumError, match="beta: its key is not admitted any more"):
        loop.round(2)
    assert loop.history[1].seconds < 30
    assert loop.history[1].missing["beta"][0] == "credential"


def test_a_site_that_is_revoked_while_the_run_waits_is_not_waited_for(bench):
    call = bench({11: ready("oak")}, wait=30.0)
    begun = time.monotonic()
    timer = threading.Timer(0.1, write_nodes, (bench.folder, {11: "oak"}))
    timer.start()
    roster = call.collect()
    timer.join()
    assert time.monotonic() - begun < 10
    assert roster.nodes == {"oak": 11}
    assert roster.refused["elm"][0] == "credential"
    assert [event["site"] for event in bench.told("site.refused")] == ["elm"]


def test_without_a_coordinators_list_the_aliases_count_as_they_are_said(bench):
    call = bench({11: ready("elm"), 12: ready("oak")}, nodes=None)
    assert call.collect().nodes == {"oak": 12, "elm": 11}
    assert call.dismiss() == []


def test_the_list_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    admitted = Admitted(tmp_path)
    assert admitted() is None
    write_nodes(tmp_path, NODES)
    first = admitted()
    assert first == NODES
    assert admitted() is first
    write_nodes(tmp_path, {2**64 - 1: "oak"})  # Flower's ids have 64 bits
    assert admitted() == {2**64 - 1: "oak"}


@pytest.mark.parametrize("text", ["", "[]", '{"oak": "oak"}', "{"])
def test_a_list_that_cannot_be_read_lets_nobody_in(tmp_path, text):
    (tmp_path / NODES_FILE).write_text(text)
    with pytest.raises(StorageError, match=r"nodes\.json"):
        Admitted(tmp_path)()


def test_a_list_that_vanished_does_not_open_the_door(tmp_path):
    admitted = Admitted(tmp_path)
    write_nodes(tmp_path, NODES)
    assert admitted() == NODES
    os.remove(tmp_path / NODES_FILE)
    with pytest.raises(StorageError, match="is gone"):
        admitted()


def test_the_list_is_plain_json(tmp_path):
    write_nodes(tmp_path, NODES)
    assert json.loads((tmp_path / NODES_FILE).read_text()) == {"11": "oak", "12": "elm"}
