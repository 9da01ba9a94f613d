"""The network between hospitals as a run's events tell it (`method.figures`), checked before anything is drawn from it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ops.story_fields import LARGEST
from ops.story_parts import Network

MOST_EDGES = 10_000  # of a line that something else told; the method itself tells 200 at most


def _finite(value: Any) -> Any:
    """Return None for a float that is no number, anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[Annotated[float, Field(ge=0, le=LARGEST)] | None, BeforeValidator(_finite)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Edge = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2)]


class _Told(BaseModel):
    """The figures of common/methods/pfednet.py; `kind` may be absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    kind: Literal["similarity-network"] = "similarity-network"
    edges: Annotated[list[Edge], Field(max_length=MOST_EDGES)] | Count
    lam: Figure
    distance_before: Figure
    distance_after: Figure
    iterations: Count
    converged: bool

    @model_validator(mode="after")
    def _simple(self) -> Self:
        if isinstance(self.edges, list):
            pairs = {frozenset(edge) for edge in self.edges}
            if len(pairs) != len(self.edges) or any(len(pair) != 2 for pair in pairs):
                raise ValueError("an edge is told twice, or joins a site with itself")
        return self


def network_of(figures: Any) -> Network | None:
    """Return what an event's figures tell of a network; None if they are of another kind, or not whole.

    A figure that is no finite number is None. Where nobody is joined there is no distance and no λ, so these are None too.

    Args:
        figures: The event's field, of any type.
    """
    try:
        told = _Told.model_validate(figures)
    except (ValidationError, OverflowError):
        return None
    edges = [(edge[0], edge[1]) for edge in told.edges] if isinstance(told.edges, list) else None
    count = told.edges if isinstance(told.edges, int) else len(told.edges)
    known = count > 0
    return Network(
        edges=edges,
        count=count,
        lam=told.lam if known else None,
        before=told.distance_before if known else None,
        after=told.distance_after if known else None,
        iterations=told.iterations,
        converged=told.converged,
    )
