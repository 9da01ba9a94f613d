"""How the round loop reaches the sites: a small interface, and its implementation over Flower's grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import safe_sentence
from common.flower import EVALUATE, QUERY, TRAIN, from_record, make_message, relay_figures
from common.frames import Parts
from common.proto.wardround_pb2 import Phase
from common.wire import CLOSING, HELLO, PING, ROUND

KINDS = {HELLO: QUERY, ROUND: TRAIN, CLOSING: EVALUATE, PING: QUERY}

# What Flower's error codes mean to an operator (docs/runtime.md); its own texts may carry a site's exception, so they end here.
FLOWER_ERRORS = {
    1: "the site's relay could not load its app; install the same wardround at the site",
    2: "the site's relay broke before it could answer; look at the site's relay log",
    3: "the message expired before the site answered, or its answer got lost on the way",
    4: "the site's answer expired before the coordinator took it",
    5: "the site's network process (SuperNode) is gone; restart it at the site",
    8: "the site's relay process ended hard; it is started again with the next message",
}


@dataclass
class Answer:
    """One answer as it arrived.

    Attributes:
        ticket: The ticket that `ask` gave.
        parts: The message's parts, None if Flower reported an error.
        relay: What the relay said of itself.
        error: Safe sentence of a Flower error.
    """

    ticket: str
    parts: Parts | None
    relay: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Link(Protocol):
    """What the round loop needs of a transport."""

    def nodes(self) -> list[int]:
        """Return the ids of the connected sites."""

    def ask(self, node: int, parts: Parts, *, phase: Phase, round: int, ttl: float) -> str:
        """Send a message to one site and return a ticket for its answer ("" if it could not be sent)."""

    def poll(self, tickets: Iterable[str]) -> list[Answer]:
        """Return the answers that have arrived; each ticket is answered once."""


class FlowerLink:
    """The link over a Flower grid.

    Args:
        grid: Flower's grid of the running ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[int]:
        """Return the ids of the connected SuperNodes, sorted."""
        return sorted(self._grid.get_node_ids())

    def ask(self, node: int, parts: Parts, *, phase: Phase, round: int, ttl: float) -> str:
        """Push one message; one at a time, so that memory does not grow with the number of sites."""
        message = make_message(parts, node=node, kind=KINDS[phase], group=str(round), ttl=ttl)
        tickets = list(self._grid.push_messages([message]))
        return (tickets[0] or "") if tickets else ""

    def poll(self, tickets: Iterable[str]) -> list[Answer]:
        """Pull what has arrived."""
        asked = list(tickets)
        return [self._read(message) for message in self._grid.pull_messages(asked)] if asked else []

    @staticmethod
    def _read(message: Message) -> Answer:
        ticket = message.metadata.reply_to_message_id
        if message.has_error():
            sentence = FLOWER_ERRORS.get(message.error.code, f"Flower reported error {message.error.code}")
            return Answer(ticket, None, error=sentence)
        try:
            return Answer(ticket, from_record(message.content), relay_figures(message.content))
        except Exception as error:
            return Answer(ticket, None, error=safe_sentence(error)[1])
