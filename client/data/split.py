"""The seeded split of cases into training, validation and test, by group.

A group (a patient, an eye pair, a study) is never divided. Groups are shuffled within their class and dealt
one after another to the split that is furthest behind its share, so that each split gets its share of the
cases and, as far as the groups allow, of every class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.dataset_json import SPLITS


def split_by_group(
    groups: Sequence[str], strata: Sequence[int], fractions: Mapping[str, float], *, seed: int
) -> list[str]:
    """Return the split of each case.

    Args:
        groups: Group key of each case.
        strata: Class of each case, or one number for all; a group counts under its first case's.
        fractions: Share of each split but training, each in [0, 1), together below 1.
        seed: Same seed, same split, whatever was drawn before.

    Returns:
        One of `SPLITS` per case. Training is never empty; with as many groups as splits with a share, none
        is.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = _shuffled_within_strata(members, strata, seed)
    shares = {split: fractions.get(split, 0.0) for split in SPLITS[1:]}
    shares["training"] = 1.0 - sum(shares.values())
    dealt = dict.fromkeys(SPLITS, 0)
    result = [""] * len(groups)
    seen = 0
    for position, group in enumerate(order):
        seen += len(members[group])
        wanting = [split for split in SPLITS if shares[split] > 0]
        empty = [split for split in wanting if not dealt[split]]
        if empty and len(order) - position <= len(empty):
            choice = empty[0]  # few groups left: a small site still gets every split it can, training first
        else:
            choice = max(wanting, key=lambda split: shares[split] * seen - dealt[split])
        dealt[choice] += len(members[group])
        for index in members[group]:
            result[index] = choice
    return result


def _shuffled_within_strata(members: Mapping[str, list[int]], strata: Sequence[int], seed: int) -> list[str]:
    by_stratum: dict[int, list[str]] = {}
    for group, indices in members.items():
        by_stratum.setdefault(strata[indices[0]], []).append(group)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed])))
    order: list[str] = []
    for stratum in sorted(by_stratum):
        names = by_stratum[stratum]
        order.extend(names[place] for place in rng.permutation(len(names)))
    return order
