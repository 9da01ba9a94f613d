"""The link over Flower's grid, with Flower's own messages: what arrives, what failed, and no foreign text."""

import inspect

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from common.errors import PayloadError
from common.flower import RECORD, from_record, make_message, relay_figures, to_record
from common.wire import CLOSING, HELLO, ROUND
from server.link import FLOWER_ERRORS, FlowerLink

PARTS = {"head": b"\x00\xffhead", "p.model": bytes(range(256)), "empty": b""}
SECRET = "/mnt/pacs/Mueller.dcm"


class FakeGrid:
    """Flower's grid, as far as the link uses it."""

    def __init__(self, tickets=("t1",)):
        self.tickets, self.pushed, self.asked, self.replies = tickets, [], [], []

    def get_node_ids(self):
        return [30, 10, 20]

    def push_messages(self, messages):
        self.pushed.extend(messages)
        return list(self.tickets)

    def pull_messages(self, tickets):
        self.asked.append(list(tickets))
        return self.replies


def asked(ticket="t1", **options):
    message = make_message(PARTS, node=7, kind="train", group="3", ttl=60.0, **options)
    message.metadata.__dict__["_message_id"] = ticket
    return message


def poll(reply):
    grid = FakeGrid()
    grid.replies = [reply]
    (answer,) = FlowerLink(grid).poll({"t1": "alpha"})
    assert grid.asked == [["t1"]]
    return answer


def test_parts_go_through_a_record_and_back():
    assert from_record(to_record(PARTS)) == PARTS
    assert from_record(to_record({})) == {}


def test_the_relays_figures_ride_beside_the_parts():
    content = to_record(PARTS, {"cpu_s": 0.5, "peak_mb": 40})
    assert from_record(content) == PARTS
    assert relay_figures(content) == {"cpu_s": 0.5, "peak_mb": 40.0}
    assert relay_figures(to_record(PARTS)) == {}
    content["relay"] = MetricRecord({"cpu_s": 1, "list": [1.0, 2.0]})
    assert relay_figures(content) == {"cpu_s": 1.0}


def test_a_record_of_another_app_is_refused():
    for content in (
        RecordDict(),
        RecordDict({"other": ArrayRecord({"x": Array("uint8", (1,), "raw", b"x")})}),
        RecordDict({RECORD: ConfigRecord({"a": 1})}),
    ):
        with pytest.raises(PayloadError, match="without wardround's record"):
            from_record(content)


def test_nodes_are_sorted():
    assert FlowerLink(FakeGrid()).nodes() == [10, 20, 30]


@pytest.mark.parametrize(("phase", "kind"), [(HELLO, "query"), (ROUND, "train"), (CLOSING, "evaluate")])
def test_a_message_carries_its_parts_kind_round_and_life(phase, kind):
    grid = FakeGrid()
    assert FlowerLink(grid).ask(7, PARTS, phase=phase, round=4, ttl=12.5) == "t1"
    (message,) = grid.pushed
    assert from_record(message.content) == PARTS
    assert (message.metadata.dst_node_id, message.metadata.message_type) == (7, kind)
    assert (message.metadata.group_id, message.metadata.ttl) == ("4", 12.5)


@pytest.mark.parametrize("tickets", [[], [None], [""]])
def test_a_message_that_flower_did_not_take_has_no_ticket(tickets):
    assert FlowerLink(FakeGrid(tickets)).ask(7, PARTS, phase=ROUND, round=1, ttl=1.0) == ""


def test_an_answer_has_its_ticket_parts_and_figures():
    answer = poll(Message(to_record({"head": b"x"}, {"cpu_s": 0.25}), reply_to=asked()))
    assert (answer.ticket, answer.parts, answer.relay, answer.error) == (
        "t1",
        {"head": b"x"},
        {"cpu_s": 0.25},
        "",
    )


def test_nobody_to_wait_for_is_no_call():
    grid = FakeGrid()
    assert FlowerLink(grid).poll({}) == []
    assert grid.asked == []


@pytest.mark.parametrize("code", [*FLOWER_ERRORS, 0, 99])
def test_an_error_of_flower_gives_our_words_and_never_its_reason(code):
    answer = poll(Message(Error(code, reason=f"ValueError: {SECRET}"), reply_to=asked()))
    assert answer.parts is None
    assert answer.ticket == "t1"
    assert answer.error == FLOWER_ERRORS.get(code, f"Flower reported error {code}")
    assert SECRET not in repr(answer)


def test_flowers_codes_mean_what_the_table_says():
    codes = {value: name for name, value in inspect.getmembers(ErrorCode) if isinstance(value, int)}
    assert {code: codes[code] for code in FLOWER_ERRORS} == {
        1: "LOAD_CLIENT_APP_EXCEPTION",
        2: "CLIENT_APP_RAISED_EXCEPTION",
        3: "MESSAGE_UNAVAILABLE",
        4: "REPLY_MESSAGE_UNAVAILABLE",
        5: "NODE_UNAVAILABLE",
        8: "CLIENT_APP_CRASHED",
    }


def test_an_answer_of_another_app_is_an_error_and_not_a_crash():
    answer = poll(Message(RecordDict({"x": ConfigRecord({"secret": SECRET})}), reply_to=asked()))
    assert answer.parts is None
    assert "another app" in answer.error
    assert SECRET not in answer.error


def test_a_reply_that_cannot_be_read_is_an_error_and_not_a_crash():
    class Broken:
        metadata = asked().metadata
        metadata.__dict__["_reply_to_message_id"] = "t1"

        def has_error(self):
            return False

        @property
        def content(self):
            raise ValueError(SECRET)

    answer = poll(Broken())
    assert (answer.ticket, answer.parts) == ("t1", None)
    assert answer.error.startswith("unexpected ValueError")
    assert SECRET not in answer.error
