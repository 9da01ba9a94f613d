"""The first exchange: who is there, who fits, who gets another chance, and what the operator is told."""

import time

import pytest

import common
from common.config import RunConfig
from common.errors import MismatchError, QuorumError
from common.events import EventLog, read_events
from common.proto import wardround_pb2 as pb
from common.site_summary import SiteSummary
from common.wire import HELLO, ROUND, Envelope, decode, encode
from server import roster as module
from server.link import Answer
from server.roster import RosterCall, needed_sites

SECRET = "/mnt/pacs/Mueller.dcm"


VERSIONS = {"wire": "1", "method fedavg": "1", "model auto": "0123456789abcdef"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.03)


def summary(alias="alpha", **changes):
    settings = {
        "task": "segmentation",
        "spatial_dims": 3,
        "channels": ("T1",),
        "labels": ("background", "foreground"),
    }
    return SiteSummary.model_validate(
        {"site": alias, "cases": {"training": 4, "validation": 1}} | settings | changes
    )


def ready(alias="alpha", **changes):
    """A site's good first answer; `changes` are fields of the envelope."""
    fields = {
        "summary": summary(alias).model_dump_json(),
        "cases": 4,
        "device": "cpu",
        "versions": VERSIONS,
    } | changes
    return lambda asked: encode(
        Envelope(**{"run": asked.run, "round": 0, "phase": HELLO, "site": alias} | fields)
    )


def failing(alias, code, message="alpha: no.", **header):
    """A failure as the relay writes it: no run, no phase."""
    head = pb.Header(
        schema=1,
        software=common.__version__,
        site=alias,
        failure=pb.Failure(code=code, message=message),
        **header,
    )
    return lambda asked: {"head": head.SerializeToString()}


def broken(error="the site's relay process ended hard"):
    return error


def silent(asked):
    return None


class FakeLink:
    """Answers each node with its scripted answers, one after the other; the last one again and again."""

    def __init__(self, scripts, *, late=()):
        self.scripts = {
            node: list(script) if isinstance(script, list) else [script] for node, script in scripts.items()
        }
        self.late = dict(late)  # node -> number of looks before it is connected
        self.asked = []
        self.open = {}
        self.doubled = False

    def nodes(self):
        self.late = {node: looks - 1 for node, looks in self.late.items() if looks}
        return [node for node in self.scripts if node not in self.late]

    def ask(self, node, parts, *, phase, round, ttl):
        assert (phase, round) == (HELLO, 0)
        assert ttl >= 1
        self.asked.append(node)
        script = self.scripts[node]
        step = script.pop(0) if len(script) > 1 else script[0]
        if step == "not sent":
            return ""
        ticket = f"t{len(self.asked)}"
        self.open[ticket] = step if isinstance(step, str) else step(decode(parts))
        return ticket

    def poll(self, tickets):
        answers = []
        for ticket in tickets:
            found = self.open.get(ticket)
            if found is not None:
                del self.open[ticket]
                answers += [
                    Answer(ticket, None, error=found) if isinstance(found, str) else Answer(ticket, found)
                ] * (2 if self.doubled else 1)
        return answers


@pytest.fixture
def call(tmp_path):
    path = tmp_path / "events.jsonl"

    def collect(scripts, sites=(), *, quorum=1.0, wait=1.0, link=None, **data):
        config = RunConfig.from_mapping(
            {"sites": sites, "data": data, "rounds": {"quorum": quorum, "ready_timeout": wait, "poll": 0.002}}
        )
        collect.link = link or FakeLink(scripts)
        return RosterCall(collect.link, "run", config, EventLog(path, "server"), VERSIONS).collect()

    collect.events = lambda name: [event for event in read_events(path) if event["event"] == name]
    return collect


def test_the_roster_has_the_order_of_the_run_and_what_each_site_said(call):
    said = summary("alpha", cases={"training": 9, "validation": 1}).model_dump_json()
    nine = ready("alpha", cases=9, summary=said)
    roster = call({1: ready("gamma"), 2: nine, 3: ready("beta")}, ("beta", "alpha", "gamma"))
    assert list(roster.nodes.items()) == [("beta", 3), ("alpha", 2), ("gamma", 1)]
    assert roster.cases == {"alpha": 9, "beta": 4, "gamma": 4}
    assert roster.summaries["beta"] == summary("beta")
    assert roster.refused == {}
    assert call.link.asked == [1, 2, 3]  # each one once
    event = next(event for event in call.events("site.ready") if event["site"] == "alpha")
    assert (event["cases"], event["device"], event["software"]) == (
        {"training": 9, "validation": 1},
        "cpu",
        common.__version__,
    )


def test_the_first_question_carries_the_runs_configuration(call):
    seen = []

    def listen(asked):
        seen.append(asked)
        return ready("alpha")(asked)

    call({1: listen}, ("alpha",))
    (asked,) = seen
    assert (asked.run, asked.round, asked.phase, asked.payloads) == ("run", 0, HELLO, {})
    assert RunConfig.from_json(asked.config).sites == ("alpha",)


def test_without_a_list_the_roster_closes_when_nobody_new_comes(call):
    link = FakeLink({1: ready("beta"), 2: ready("alpha")}, late={2: 8})
    roster = call({}, link=link)
    assert list(roster.nodes.items()) == [("alpha", 2), ("beta", 1)]


def test_without_a_list_it_waits_for_one_that_was_asked(call):
    answered = time.monotonic() + 0.2

    class Slow(FakeLink):
        def poll(self, tickets):
            return super().poll([t for t in tickets if t == "t1" or time.monotonic() > answered])

    roster = call({}, link=Slow({1: ready("alpha"), 2: ready("beta")}), wait=5.0)
    assert list(roster.nodes) == ["alpha", "beta"]


def test_without_a_list_a_site_whose_worker_is_starting_gets_its_chance(call, monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.2)  # longer than the roster waits for newcomers
    roster = call({1: ready("alpha"), 2: [failing("beta", "worker"), ready("beta")]}, wait=5.0)
    assert list(roster.nodes) == ["alpha", "beta"]


def test_a_silent_site_is_named_after_the_time_is_over(call):
    with pytest.raises(QuorumError, match="1 of 2 sites answered, 2 are needed; silent: beta") as caught:
        call({1: ready("alpha"), 2: silent}, ("alpha", "beta"), wait=0.1)
    assert "SuperNode and worker run" in str(caught.value)
    (event,) = call.events("site.refused")
    assert (event["site"], event["code"]) == ("beta", "silent")


def test_nobody_at_all(call):
    with pytest.raises(QuorumError, match="0 of any number of sites answered, 1 are needed; silent: all"):
        call({}, wait=0.05)


def test_with_a_quorum_the_run_goes_on_without_the_silent_one_and_says_so(call):
    roster = call(
        {1: ready("alpha"), 2: silent, 3: ready("gamma")}, ("alpha", "beta", "gamma"), quorum=0.6, wait=0.1
    )
    assert list(roster.nodes) == ["alpha", "gamma"]
    assert [event["site"] for event in call.events("site.refused")] == ["beta"]


@pytest.mark.parametrize(
    "trouble",
    [failing("alpha", "worker", "alpha: no worker."), failing("alpha", "cancelled"), broken(), "not sent"],
)
def test_a_worker_that_is_not_up_yet_is_asked_again(call, trouble):
    roster = call({1: [trouble, trouble, ready("alpha")]}, ("alpha",), wait=5.0)
    assert roster.nodes == {"alpha": 1}
    assert roster.refused == {}
    assert call.link.asked == [1, 1, 1]


def test_it_is_not_asked_again_at_once(call, monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 30.0)
    with pytest.raises(QuorumError):
        call({1: failing("alpha", "worker")}, ("alpha",), wait=0.1)
    assert call.link.asked == [1]


@pytest.mark.parametrize("alias", ["alpha", "partition:0", "unknown-site", "worker"])
def test_a_worker_that_never_comes_up_is_told_in_its_own_words(call, alias):
    message = "no worker answers on its socket after 20 s. Start the site's worker, then retry."
    with pytest.raises(QuorumError, match="silent: alpha") as caught:
        call({17: failing(alias, "worker", message)}, ("alpha",), wait=0.1)
    assert message in str(caught.value)
    assert len(call.link.asked) > 1
    warning = call.events("warning")[0]
    assert warning["message"] == message
    assert warning["site"] == ("alpha" if alias == "alpha" else "node-0017")


def test_trouble_that_is_over_is_not_told_again(call):
    scripts = {
        1: [failing("alpha", "worker", "alpha: was starting."), ready("alpha")],
        2: failing("beta", "worker", "beta: is down."),
    }
    with pytest.raises(QuorumError, match="silent: beta") as caught:
        call(scripts, ("alpha", "beta"), wait=0.3)
    assert "beta: is down." in str(caught.value)
    assert "alpha: was starting." not in str(caught.value)


@pytest.mark.parametrize("code", ["data", "policy", "config", "mismatch", "internal"])
def test_a_site_that_cannot_is_refused_with_its_own_sentence(call, code):
    with pytest.raises(MismatchError, match="beta: the policy says no"):
        call({1: ready("alpha"), 2: failing("beta", code, "beta: the policy says no.")}, ("alpha", "beta"))
    assert call.link.asked == [1, 2]
    (event,) = call.events("site.refused")
    assert (event["site"], event["code"], event["message"]) == ("beta", code, "beta: the policy says no.")


def test_a_failures_code_is_one_of_ours_and_its_sentence_is_cut(call):
    with pytest.raises(MismatchError) as caught:
        call({1: failing("alpha", "c" * 999, "m" * 9999)}, ("alpha",))
    assert len(str(caught.value)) == 500
    assert call.events("site.refused")[0]["code"] == "payload"


def test_a_site_that_claims_other_cases_than_its_summary_is_refused(call):
    with pytest.raises(MismatchError, match="says 10 training cases, its summary 4"):
        call({1: ready("alpha", cases=10)}, ("alpha",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": ("FLAIR",)}, r"channels: expected \(T1\), got \(FLAIR\)"),
        ({"labels": ("background", "tumour")}, "labels: expected"),
        ({"task": "classification"}, "task: expected segmentation, got classification"),
        ({"spatial_dims": 2}, "spatial_dims: expected 3, got 2"),
        ({"cases": {"validation": 3}}, "training cases: expected at least 1, got 0"),
    ],
)
def test_a_site_whose_data_does_not_fit_is_refused_by_field(call, changes, said):
    with pytest.raises(MismatchError, match=said):
        call({1: ready("alpha", summary=summary(**changes).model_dump_json())}, ("alpha",))
    assert call.events("site.refused")[0]["site"] == "alpha"


def test_with_a_quorum_a_refused_site_does_not_stop_the_others(call):
    bad = ready("beta", summary=summary("beta", channels=("FLAIR",)).model_dump_json())
    roster = call({1: ready("alpha"), 2: bad, 3: ready("gamma")}, ("alpha", "beta", "gamma"), quorum=0.6)
    assert list(roster.nodes) == ["alpha", "gamma"]
    assert roster.refused["beta"][0] == "mismatch"


def test_another_software_version_is_refused_with_both(call):
    with pytest.raises(
        MismatchError, match=f"alpha: runs wardround 9.9, the coordinator {common.__version__}"
    ):
        call({1: ready("alpha", software="9.9")}, ("alpha",))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ready("alpha", summary="{"), "data summary cannot be read"),
        (ready("alpha", summary=""), "data summary cannot be read"),
        (ready("alpha", run="another"), "answered something else"),
        (ready("alpha", phase=ROUND), "answered something else"),
    ],
)
def test_an_answer_that_is_none_is_refused_and_not_asked_again(call, answer, said):
    with pytest.raises(MismatchError, match=said):
        call({1: answer}, ("alpha",))
    assert call.link.asked == [1]


@pytest.mark.parametrize("parts", [{}, {"head": b"\xff"}, {"head": pb.Header(schema=7).SerializeToString()}])
def test_bytes_that_are_no_answer_are_refused_under_the_nodes_number(call, parts):
    with pytest.raises(QuorumError, match="silent: alpha"):
        call({4_000_000_017: lambda asked: parts}, ("alpha",), wait=0.1)
    assert call.events("site.refused")[0]["site"] == "node-0017"


def test_a_second_node_of_the_same_alias_is_refused_and_the_first_one_stays(call):
    roster = call({1: ready("alpha"), 2: ready("alpha"), 3: ready("beta")}, ("alpha", "beta"))
    assert roster.nodes == {"alpha": 1, "beta": 3}
    (event,) = call.events("site.refused")
    assert event["site"] == "node-0002"
    assert "says it is 'alpha', as another node does" in event["message"]


def test_a_site_of_another_run_is_left_out(call):
    roster = call({1: ready("alpha"), 2: ready("delta")}, ("alpha",))
    assert roster.nodes == {"alpha": 1}
    assert "'delta', which is not a site of this run (alpha)" in roster.refused["node-0002"][1]


def test_a_stranger_does_not_hide_who_is_silent(call):
    with pytest.raises(QuorumError, match="silent: alpha") as caught:
        call({2: ready("delta")}, ("alpha",), wait=0.1)
    assert "'delta', which is not a site of this run" in str(caught.value)


def test_a_refused_site_does_not_hide_who_is_silent(call):
    with pytest.raises(MismatchError, match=r"channels: .*Silent: beta\."):
        call(
            {1: ready("alpha", summary=summary(channels=("FLAIR",)).model_dump_json()), 2: silent},
            ("alpha", "beta"),
            wait=0.1,
        )


@pytest.mark.parametrize("alias", ["", "../up", "a b", "x" * 65, "alpha\n", "<script>", "\x1b[2J"])
@pytest.mark.parametrize("sites", [(), ("alpha",)])
def test_an_alias_that_is_none_is_refused(call, alias, sites):
    with pytest.raises((MismatchError, QuorumError)) as caught:
        call({1: ready(alias)}, sites, wait=0.1)
    (refused, *_) = call.events("site.refused")
    assert refused["site"] == "node-0001"
    assert str(caught.value).isprintable()


def test_an_answer_that_comes_twice_counts_once(call):
    link = FakeLink({1: ready("alpha")})
    link.doubled = True
    assert call({}, ("alpha",), link=link).nodes == {"alpha": 1}
    assert len(call.events("site.ready")) == 1


@pytest.mark.parametrize(
    ("quorum", "asked", "needed"),
    [
        (1.0, 3, 3),
        (2 / 3, 3, 2),
        (0.5, 3, 2),
        (0.34, 3, 2),
        (1 / 3, 3, 1),
        (0.1, 5, 1),
        (0.7, 10, 7),
        (1.0, 0, 0),
    ],
)
def test_how_many_sites_a_quorum_needs(quorum, asked, needed):
    config = RunConfig.from_mapping({"rounds": {"quorum": quorum}})
    assert needed_sites(config, asked) == needed


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"method fedavg": "2"}, "method fedavg is 1 at one end and 2 at the other"),
        ({"model auto": "f" * 16}, "model auto is 0123456789abcdef at one end and ffffffffffffffff"),
        ({"task x": "1"}, "task x is nothing at one end and 1 at the other"),
    ],
)
def test_a_site_of_other_versions_is_refused_with_both_values(call, other, named):
    with pytest.raises(MismatchError, match=named):
        call({1: ready("alpha", versions=VERSIONS | other)}, ("alpha",))
    assert call.events("site.refused")[0]["code"] == "mismatch"


def test_a_site_that_comes_later_joins_in_its_place(tmp_path):
    config = RunConfig.from_mapping(
        {"sites": ("beta", "alpha"), "rounds": {"quorum": 0.5, "ready_timeout": 0.2, "poll": 0.002}}
    )
    link = FakeLink({1: ready("alpha"), 2: ready("beta")}, late={2: 10_000})
    roster_call = RosterCall(link, "run", config, EventLog(None, "server"), VERSIONS)
    roster = roster_call.collect()
    assert list(roster.nodes) == ["alpha"]
    assert roster_call.look() == []
    link.late.clear()
    assert roster_call.look() == ["beta"]
    assert list(roster.nodes) == ["beta", "alpha"]
    assert roster_call.look() == []


def test_a_site_that_was_refused_is_asked_again_in_a_running_run(monkeypatch):
    config = RunConfig.from_mapping(
        {"sites": ("alpha", "beta"), "rounds": {"quorum": 0.5, "ready_timeout": 0.2, "poll": 0.002}}
    )
    link = FakeLink(
        {1: ready("alpha"), 2: [failing("beta", "data", "beta: case 3 is broken."), ready("beta")]}
    )
    roster_call = RosterCall(link, "run", config, EventLog(None, "server"), VERSIONS)
    roster = roster_call.collect()
    assert roster.refused["beta"][0] == "data"
    assert roster_call.look() == []
    assert "beta" in roster.refused
    monkeypatch.setattr(module, "REFUSED_SECONDS", 0.0)
    assert roster_call.look() == ["beta"]
    assert not roster.refused
