"""Figures as (numerator, denominator): added over cases and sites first, divided last."""

from __future__ import annotations

from collections.abc import Mapping

Sums = dict[str, tuple[float, float]]


def add_sums(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> Sums:
    """Return the sums of both; a figure that only one has is taken as it is."""
    total = dict(a)
    for name, (numerator, denominator) in b.items():
        before = total.get(name, (0.0, 0.0))
        total[name] = (before[0] + numerator, before[1] + denominator)
    return total


def divide(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the figures; one to which no case contributed (denominator 0) is left out."""
    return {
        name: numerator / denominator for name, (numerator, denominator) in sums.items() if denominator > 0
    }
