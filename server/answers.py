"""What an answer of a site must look like before anything of it is used, told or quoted.

Payloads are checked by what the method promised (common/payload.py, common/guard.py); here is the rest: who says it, of
which round, with which figures and in which words. A site is not trusted to write plain text: a code that wardround does
not have becomes one that it has, and a sentence loses what could steer a terminal or a page.
"""

from __future__ import annotations

import math
import re

from common.errors import PayloadError, WardroundError
from common.frames import shown
from common.proto.wardround_pb2 import Phase
from common.wire import Envelope

# Names of figures and phases go into events and report: class names have spaces and accents, nothing has markup.
WORD = re.compile(r"[\w .,+/()-]{1,80}")
LEDGER = re.compile(r"(\d{1,15}:[0-9a-f]{64})?")
DEVICE = re.compile(r"[a-z0-9:]{0,16}")
CODES = {WardroundError.code, "transport", *(kind.code for kind in WardroundError.__subclasses__())}
LONGEST = 500
MOST_CASES = 1 << 53


def told(failure: tuple[str, str], site: str) -> tuple[str, str]:
    """Return a site's failure in words that may be told: a known code, printable, naming the site."""
    code, sentence = failure
    sentence = sentence[:LONGEST]
    if not sentence.isprintable():
        sentence = ascii(sentence)[1:-1][:LONGEST]
    return (code if code in CODES else PayloadError.code), named(sentence, site)


def device_of(envelope: Envelope) -> str:
    """Return a site's device type as it may be told."""
    return envelope.device if DEVICE.fullmatch(envelope.device) else "unknown"


def named(sentence: str, site: str) -> str:
    """Return a sentence that begins with the site it is about."""
    return sentence if site in sentence else f"{site}: {sentence}"


def check_sender(envelope: Envelope, run: str, number: int, phase: Phase, site: str) -> None:
    """Check that an answer is this site's, to this question.

    Raises:
        PayloadError: It is not.
    """
    if (envelope.site, envelope.run, envelope.round, envelope.phase) != (site, run, number, phase):
        raise PayloadError(
            f"{site}: answered as '{shown(envelope.site)}' for round {envelope.round}, asked was round {number}; "
            "the answer is refused.",
            site=site,
        )


def check_figures(envelope: Envelope, number: int, site: str) -> None:
    """Check names and numbers of an answer's figures.

    Raises:
        PayloadError: A name with markup, a number that cannot be, a figure of another round or given twice.
    """
    words = [word for item in envelope.metrics for word in (item.split, item.model, item.primary, *item.sums)]
    if not all(WORD.fullmatch(word) for word in (*words, *envelope.seconds)):
        raise PayloadError(
            f"{site}: a name among its figures is no plain word; the answer is refused.", site=site
        )
    if not LEDGER.fullmatch(envelope.ledger):
        raise PayloadError(
            f"{site}: its ledger's head is no count and hash; the answer is refused.", site=site
        )
    if math.isinf(envelope.loss) or not all(0 <= value < math.inf for value in envelope.seconds.values()):
        raise PayloadError(
            f"{site}: its loss or its seconds cannot be (infinite or negative); the answer is refused.",
            site=site,
        )
    places = [(item.split, item.model) for item in envelope.metrics]
    if len(set(places)) < len(places) or any(item.round != number - 1 for item in envelope.metrics):
        raise PayloadError(
            f"{site}: figures of another round than {number - 1}, or the same twice; the answer is refused.",
            site=site,
        )
    for item in envelope.metrics:
        sums = item.sums.values()
        if item.cases > MOST_CASES or not all(
            math.isfinite(top) and 0 <= bottom < math.inf for top, bottom in sums
        ):
            raise PayloadError(
                f"{site}: a figure on split {item.split} cannot be (not finite, or a negative count); the answer is "
                "refused.", site=site,
            )  # fmt: skip
