"""The masks of a round as a run's events tell them (`method.figures`), checked before anything is drawn from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ops.story_parts import Masks

MOST_SITES, MOST_TENSORS = 256, 2000  # of a line that something else told, more could not be drawn

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Matrix = list[list[Share | None]]


class _Told(BaseModel):
    """The figures of common/mask_figures.py."""

    model_config = ConfigDict(strict=True, extra="ignore")

    kind: Literal["sensitivity-masks"]
    parameters: Count
    sites: Names = Field(max_length=MOST_SITES)
    density: list[Share]
    tensors: Names = Field(max_length=MOST_TENSORS)
    sizes: list[Count]
    by_tensor: list[list[Share]]
    overlap: Matrix
    chance: Matrix
    chance_by_tensor: Matrix
    holders: list[Count]
    tensors_left_out: Count = 0
    sites_left_out: Count = 0

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        sites, tensors = len(self.sites), len(self.tensors)
        lengths = [len(self.density), len(self.by_tensor), len(self.holders) - 1, len(set(self.sites))]
        for matrix in (self.overlap, self.chance, self.chance_by_tensor):
            lengths += [len(matrix), *(len(row) for row in matrix)]
        if set(lengths) != {sites} or {len(self.sizes), *(len(row) for row in self.by_tensor)} != {tensors}:
            raise ValueError("the lists do not belong to one set of sites and tensors")
        return self


def masks_of(figures: Any) -> Masks | None:
    """Return what an event's figures tell of masks; None if they are of another kind, or not whole.

    Args:
        figures: The event's field, of any type.
    """
    try:
        told = _Told.model_validate(figures)
    except ValidationError:
        return None
    return Masks(**{name: getattr(told, name) for name in _Told.model_fields if name != "kind"})
