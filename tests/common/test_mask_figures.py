"""The figures of a round's masks against a count coordinate by coordinate, and the line they become."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import mask_figures
from common.events import EVENTS, EventLog, read_events
from common.mask_figures import MaskFigures
from common.numerics.residual import overlap

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "empty": (0,), "b.weight": (2, 9), "c": ()}


def masks_of(seed, density):
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=drawn) < density for name, shape in SHAPES.items()}


def figures_of(masks):
    made = MaskFigures({name: int(np.prod(shape)) for name, shape in SHAPES.items()})
    for site, mask in masks.items():
        made.add(site, {name: part for name, part in mask.items() if part.any()})
    return made.told()


def flat(mask):
    return [bool(value) for name in SHAPES for value in mask[name].reshape(-1)]


def tensors_flat():
    return [name for name, shape in SHAPES.items() for _ in range(int(np.prod(shape)))]


@settings(max_examples=20, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=4, unique=True),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_figures_are_those_of_a_slow_count(seeds, density):
    masks = {
        f"s{seed}": masks_of(seed, density * (0.5 + 0.5 * (place % 2))) for place, seed in enumerate(seeds)
    }
    told = figures_of(masks)
    each = {site: flat(mask) for site, mask in masks.items()}
    owner, size = tensors_flat(), len(tensors_flat())
    assert told["parameters"] == size
    assert told["sites"] == list(masks)
    assert told["density"] == [round(sum(values) / size, 4) for values in each.values()]
    assert told["tensors"] == [name for name in SHAPES if name != "empty"]
    for row, values in zip(told["by_tensor"], each.values(), strict=True):
        for name, got in zip(told["tensors"], row, strict=True):
            mine = [value for value, of in zip(values, owner, strict=True) if of == name]
            assert got == round(sum(mine) / len(mine), 4)
    held = [sum(values[place] for values in each.values()) for place in range(size)]
    assert told["holders"] == [held.count(sites) for sites in range(len(masks) + 1)]
    for (row, a), (column, b) in product(enumerate(each.values()), repeat=2):
        both = sum(x and y for x, y in zip(a, b, strict=True))
        either = sum(x or y for x, y in zip(a, b, strict=True))
        assert told["overlap"][row][column] == (round(both / either, 4) if either else None)
        if row == column or not either:
            assert told["chance"][row][column] is told["chance_by_tensor"][row][column] is None
            continue
        inside = 0.0
        for name in told["tensors"]:
            of = [place for place in range(size) if owner[place] == name]
            inside += sum(a[place] for place in of) * sum(b[place] for place in of) / len(of)
        for key, shared in (("chance", sum(a) * sum(b) / size), ("chance_by_tensor", inside)):
            assert told[key][row][column] == pytest.approx(shared / (sum(a) + sum(b) - shared), abs=6e-5)


def test_overlap_agrees_with_that_of_plain_masks_and_chance_with_random_ones():
    shapes = {"one": (200, 100), "two": (3000,)}
    rates = {"one": 0.02, "two": 0.7}
    drawn = torch.Generator().manual_seed(1)
    masks = [
        {name: torch.rand(shape, generator=drawn) < rates[name] for name, shape in shapes.items()}
        for _ in range(2)
    ]
    made = MaskFigures({name: int(np.prod(shape)) for name, shape in shapes.items()})
    for place, mask in enumerate(masks):
        made.add(str(place), mask)
    told = made.told()
    assert told["overlap"][0][1] == pytest.approx(float(overlap(masks)[0, 1]), abs=6e-5)
    # random within each tensor: what is expected by tensor is found, and densities alone expect far less
    assert told["overlap"][0][1] == pytest.approx(told["chance_by_tensor"][0][1], abs=0.02)
    assert told["chance"][0][1] < 0.3 * told["overlap"][0][1]


def test_chunks_and_tails_of_bits_are_counted_once(monkeypatch):
    monkeypatch.setattr(mask_figures, "CHUNK", 3)
    drawn = torch.Generator().manual_seed(2)
    masks = [torch.rand(101, generator=drawn) < 0.4 for _ in range(3)]
    made = MaskFigures({"w": 101})
    for place, mask in enumerate(masks):
        made.add(str(place), {"w": mask})
    expected = torch.stack(masks).sum(dim=0).bincount(minlength=4).tolist()
    assert made.told()["holders"] == expected


def test_what_is_kept_and_told_is_capped(monkeypatch):
    monkeypatch.setattr(mask_figures, "MOST_SITES", 2)
    monkeypatch.setattr(mask_figures, "MOST_TENSORS", 2)
    made = MaskFigures({"small": 2, "large": 9, "larger": 10})
    for site in "abc":
        made.add(site, {"small": torch.ones(2, dtype=torch.bool)})
    told = made.told()
    assert (told["sites"], told["sites_left_out"]) == (["a", "b"], 1)
    assert (told["tensors"], told["tensors_left_out"]) == (["large", "larger"], 1)
    assert told["density"] == [round(2 / 21, 4)] * 2
    assert told["overlap"][0][1] == 1.0
    assert [len(bits) for bits in made._bits.values()] == [1 + 2 + 2] * 2


def test_a_full_event_stays_a_short_line(tmp_path):
    made = MaskFigures({f"encoder.blocks.{place}.weight": 8 for place in range(300)})
    for place in range(40):
        made.add(
            f"hospital-{place}",
            {
                f"encoder.blocks.{place}.weight": torch.tensor([True] * 3 + [False] * 5)
                for place in range(300)
            },
        )
    log = EventLog(tmp_path / "events.jsonl", "server")
    log.emit("method.figures", round=1, method="pfl-resfim", figures=made.told())
    log.close()
    assert (tmp_path / "events.jsonl").stat().st_size < 100_000
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["figures"] == json.loads(json.dumps(made.told()))
    assert event.keys() - {"v", "t", "process", "event"} <= EVENTS["method.figures"][1].keys()


def test_masks_of_another_network_are_refused_and_no_mask_tells_nothing():
    made = MaskFigures({"w": 4})
    assert made.told() == {}
    for mask in ({"w": torch.ones(5, dtype=torch.bool)}, {"v": torch.ones(4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="the round's own network"):
            made.add("a", mask)
    assert MaskFigures({}).told() == {}
