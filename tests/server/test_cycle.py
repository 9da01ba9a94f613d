"""One message cycle under every way a message can go wrong, on a link whose sites follow a script."""

import time

import pytest

import common
from common.config import RoundConfig
from common.events import EventLog, read_events
from common.proto import wardround_pb2 as pb
from common.wire import PING, ROUND, Envelope, decode, encode
from server import cycle as module
from server.cycle import Cycle, LateTickets
from server.link import Answer

GOOD, GONE, NEVER = "good", "gone", "never"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.03)


class ScriptLink:
    """Each site answers its asks in turn: `good`, `gone` (Flower's error), `never`, a failure code, or (seconds, answer).

    `doing` says which round a site claims to work on when it is pinged; None answers no ping.
    """

    def __init__(self, doing=None, **scripts):
        self.scripts = {site: list(script) for site, script in scripts.items()}
        self.names = dict(enumerate(scripts, 1))
        self.doing = doing or {}
        self.asked, self.pings, self.due = [], [], {}

    def ask(self, node, parts, *, phase, round, ttl):
        site, ticket = self.names[node], f"t{len(self.asked) + len(self.pings)}"
        assert ttl > 0
        if phase == PING:
            self.pings.append(site)
            if self.doing.get(site) is not None:
                answer = encode(Envelope(decode(parts).run, self.doing[site], PING, site))
                self.due[ticket] = (time.monotonic(), Answer(ticket, answer))
            return ticket
        script = self.scripts[site]
        step = script.pop(0) if len(script) > 1 else script[0]
        if step == "unsent":
            self.asked.append((site, round))
            return ""
        wait, step = step if isinstance(step, tuple) else (0.0, step)
        self.asked.append((site, round))
        if step != NEVER:
            self.due[ticket] = (time.monotonic() + wait, self._answer(ticket, step))
        return ticket

    @staticmethod
    def _answer(ticket, step):
        if step == GONE:
            return Answer(ticket, None, error="the site is gone")
        head = pb.Header(schema=1, software=common.__version__)
        if step != GOOD:
            head.failure.code, head.failure.message = step, f"{step} happened"
        return Answer(ticket, {"head": head.SerializeToString()})

    def poll(self, tickets):
        now = time.monotonic()
        ready = [ticket for ticket in tickets if ticket in self.due and self.due[ticket][0] <= now]
        return [self.due.pop(ticket)[1] for ticket in ready]


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "events.jsonl"

    def start(link, *, needed=0, number=4, absent=(), late=None, **settings):
        rounds = {"deadline": 1.0, "poll": 0.002, "retry_wait": 0.01, "probe": 30.0, "retries": 2} | settings
        taken, missed = [], {}
        cycle = Cycle(
            link, EventLog(path, "server"), RoundConfig(**rounds), run="run", number=number, phase=ROUND,
            nodes={site: node for node, site in link.names.items()}, message=lambda site: {"head": b"", "config": site.encode()},
            needed=needed or len(link.names), late=late or LateTickets(), absent=absent,
        )  # fmt: skip

        def take(site, answer, seconds):
            if answer.parts is None:
                return "transport", f"{site}: {answer.error}."
            header = pb.Header.FromString(answer.parts["head"])
            if header.failure.code:
                return header.failure.code, f"{site}: {header.failure.message}."
            taken.append(site)
            return None

        started = time.monotonic()
        cycle.run(
            list(link.names.values()),
            take,
            lambda site, code, sentence: missed.update({site: (code, sentence)}),
        )
        start.seconds = time.monotonic() - started
        return taken, missed

    start.events = lambda name: [event for event in read_events(path) if event["event"] == name]
    return start


def test_all_answer(run):
    link = ScriptLink(a=[GOOD], b=[GOOD])
    assert run(link) == (["a", "b"], {})
    assert link.asked == [("a", 4), ("b", 4)]
    assert run.events("site.retry") == []


@pytest.mark.parametrize("trouble", [GONE, "worker", "cancelled", "storage", "internal", "unsent"])
def test_a_site_that_was_not_reached_is_asked_again(run, trouble):
    link = ScriptLink(a=[GOOD], b=[trouble, trouble, GOOD])
    taken, missed = run(link)
    assert (sorted(taken), missed) == (["a", "b"], {})
    retries = run.events("site.retry")
    assert [(event["site"], event["attempt"]) for event in retries] == [("b", 1), ("b", 2)]
    assert retries[0]["code"] == ("transport" if trouble in (GONE, "unsent") else trouble)


@pytest.mark.parametrize("trouble", ["data", "policy", "payload", "mismatch", "training"])
def test_a_site_that_says_no_is_not_asked_again(run, trouble):
    link = ScriptLink(a=[GOOD], b=[trouble, GOOD])
    taken, missed = run(link)
    assert (taken, missed) == (["a"], {"b": (trouble, f"b: {trouble} happened.")})
    assert run.seconds < 0.5


def test_a_round_that_can_do_without_gives_up_after_the_retries(run):
    link = ScriptLink(a=[GOOD], b=[GOOD], c=[GONE])
    taken, missed = run(link, needed=2)
    assert sorted(taken) == ["a", "b"]
    assert missed == {"c": ("transport", "c: the site is gone.")}
    assert [site for site, _ in link.asked].count("c") == 3
    assert run.seconds < 0.5


def test_a_round_that_cannot_do_without_asks_until_the_deadline_with_growing_waits(run):
    link = ScriptLink(a=[GOOD], b=[GONE])
    taken, missed = run(link, needed=2, deadline=0.7)
    assert (taken, missed["b"][0]) == (["a"], "transport")
    assert 5 <= [site for site, _ in link.asked].count("b") <= 8  # waits 10, 20, 40 ... ms
    assert run.seconds <= 0.8


def test_an_unforeseen_exception_is_repeated_a_few_times_only(run):
    link = ScriptLink(a=[GOOD], b=["internal"])
    _, missed = run(link, needed=2)
    assert missed["b"] == ("internal", "b: internal happened.")
    assert [site for site, _ in link.asked].count("b") == 3
    assert run.seconds < 0.5


def test_a_site_that_was_missing_last_time_is_asked_once_where_the_round_can_do_without(run):
    link = ScriptLink(a=[GOOD], b=[GONE])
    run(link, needed=1, absent=("b",))
    assert [site for site, _ in link.asked].count("b") == 1


def test_a_slow_site_is_waited_for_and_never_asked_twice(run):
    link = ScriptLink({"b": 4}, a=[GOOD], b=[(0.4, GOOD)])
    taken, missed = run(link, probe=0.05, number=4)
    assert (sorted(taken), missed) == (["a", "b"], {})
    assert len(link.asked) == 2
    assert "b" in link.pings
    assert "a" not in link.pings


def test_a_message_that_got_lost_is_sent_again(run):
    link = ScriptLink({"b": 0}, a=[GOOD], b=[NEVER, GOOD])
    taken, missed = run(link, probe=0.05)
    assert (sorted(taken), missed) == (["a", "b"], {})
    assert "got lost on the way" in run.events("site.retry")[0]["message"]
    assert run.seconds < 0.6


def test_a_silent_site_is_named_when_the_time_is_over(run):
    link = ScriptLink(a=[GOOD], b=[NEVER])
    taken, missed = run(link, deadline=0.2, probe=0.05)
    assert taken == ["a"]
    assert missed["b"] == ("deadline", "b: did not answer within the round's deadline of 0.2 s.")
    assert link.pings == ["b"]  # one question at a time


def test_the_reason_before_the_silence_is_told_too(run):
    link = ScriptLink(a=[GONE, NEVER])
    _, missed = run(link, deadline=0.2)
    assert missed["a"][0] == "deadline"
    assert "Before that: a: the site is gone." in missed["a"][1]


def test_the_first_good_answer_counts_and_the_second_is_refused(run):
    link = ScriptLink({"a": 0}, a=[(0.2, GOOD), GOOD], b=[(0.4, GOOD)])
    taken, _ = run(link, probe=0.05)
    assert sorted(taken) == ["a", "b"]  # a's message only seemed lost: both its answers came
    assert [(event["site"], event["round"]) for event in run.events("site.late")] == [("a", 4)]


def test_an_answer_to_a_former_round_is_recognised_and_refused(run):
    late = LateTickets()
    link = ScriptLink(a=[(0.15, GOOD), (0.2, GOOD)], b=[GOOD])
    _, missed = run(link, deadline=0.1, late=late, number=4)
    assert missed["a"][0] == "deadline"
    taken, missed = run(link, deadline=1.0, late=late, number=5)
    assert (sorted(taken), missed) == (["a", "b"], {})
    event = run.events("site.late")[0]
    assert (event["site"], event["round"]) == ("a", 4)
    assert event["seconds"] >= 0.15


def test_tickets_of_long_ago_are_forgotten(run):
    late = LateTickets({"t99": ("a", 1, time.monotonic() - 100.0)})
    run(ScriptLink(a=[GOOD]), late=late, deadline=1.0)
    assert late.open == {}


def test_a_ping_of_a_stranger_changes_nothing(run):
    link = ScriptLink({"a": 0}, a=[(0.3, GOOD)])
    real = link.ask

    def ask(node, parts, *, phase, round, ttl):
        ticket = real(node, parts, phase=phase, round=round, ttl=ttl)
        if phase == PING:
            link.due[ticket] = (0.0, Answer(ticket, encode(Envelope("other", 0, PING, "a"))))
        return ticket

    link.ask = ask
    taken, missed = run(link, probe=0.02)
    assert (taken, missed) == (["a"], {})
    assert len(link.asked) == 1
