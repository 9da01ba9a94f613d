"""The hospital's policy, enforced: which methods it takes part in and which payloads leave it."""

from __future__ import annotations

from collections.abc import Iterable

from client.site_config import Policy
from common.errors import PolicyError, nearest
from common.method import Method
from common.payload import Kind, Payload, PayloadSpec

ANY = "*"


def take_part(policy: Policy, site: str, method: Method, specs: Iterable[PayloadSpec]) -> None:
    """Check that the site takes part in a method and lets its payloads out, before any work is done.

    Args:
        policy: The hospital's policy.
        site: Its alias.
        method: The method.
        specs: What the method sends with the run's parameters.

    Raises:
        PolicyError: It does not, naming the method or the payload kind.
    """
    if ANY not in policy.methods and method.name not in policy.methods:
        raise PolicyError(
            f"{site}: the site's policy does not take part in method '{method.name}'. "
            f"{nearest(method.name, policy.methods)}",
            site=site,
        )
    for spec in specs:
        if ANY not in policy.kinds and spec.kind not in policy.kinds:
            raise PolicyError(
                f"{site}: method '{method.name}' sends payloads of kind '{spec.kind}', which the site's policy keeps in.",
                site=site,
            )
        if spec.kind is Kind.DATA_SKETCH and ANY not in policy.sketches and spec.form not in policy.sketches:
            allowed = ", ".join(policy.sketches) or "none"
            raise PolicyError(
                f"{site}: method '{method.name}' asks for the data sketch '{spec.form}', the site's policy lets out: {allowed}.",
                site=site,
            )


def enough_cases(policy: Policy, site: str, cases: int) -> None:
    """Check that enough training cases stand behind what would leave.

    Raises:
        PolicyError: Too few, with both numbers.
    """
    if cases < policy.min_cases:
        raise PolicyError(
            f"{site}: {cases} training cases are fewer than the site's policy asks for ({policy.min_cases}).",
            site=site,
        )


def release(policy: Policy, site: str, payloads: Iterable[Payload], cases: int) -> None:
    """Check what is about to leave.

    Raises:
        PolicyError: A payload of a kind that stays in, or too few cases behind it.
    """
    for payload in payloads:
        if ANY not in policy.kinds and payload.kind not in policy.kinds:
            raise PolicyError(
                f"{site}: the site's policy lets no payload of kind '{payload.kind}' out.", site=site
            )
        if payload.kind is Kind.DATA_SKETCH and ANY not in policy.sketches:
            for form in payload.tensors:
                if form not in policy.sketches:
                    raise PolicyError(
                        f"{site}: the site's policy lets no data sketch '{form}' out.", site=site
                    )
    enough_cases(policy, site, cases)
