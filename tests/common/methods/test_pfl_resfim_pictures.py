"""pFL-ResFIM: what a hospital can look at of the other sites' styles, and that nothing of it leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from client.slices import GAP
from common.errors import StorageError
from common.method import make_halves
from common.methods import get_method
from common.numerics.rng import generator
from common.numerics.spectrum import transfer, window
from common.sensitivity import Measurement, measure_style
from common.wire import decode
from tests.common.methods.test_pfl_resfim import image_config, image_site
from tests.harness import Federation, read_events


def measurement(**changes):
    plain = {"beta": 0.1, "lam": 1.0, "keep": "none"} | changes
    return Measurement(4, "empirical", "real", "abs", "mean", **plain)


def work_of(images):
    return SimpleNamespace(
        ctx=SimpleNamespace(seed=3, site="a", round=2), samples=lambda most: iter([(images[:most], None)])
    )


def images_of(name, *shape):
    return torch.rand(shape, generator=generator(name))


@pytest.mark.parametrize("shape", [(2, 3, 16, 12), (2, 1, 8, 10, 6)], ids=["2d colours", "3d"])
def test_a_sample_is_shown_as_it_is_and_in_every_other_style(shape):
    mine = images_of("mine", *shape)
    form, own = measure_style([mine], beta=0.1, bank=0, generator=generator("x"))
    others = {
        f"{form}/{site}": measure_style(
            [place + images_of(site, *shape)], beta=0.1, bank=0, generator=generator("x")
        )[1]
        for place, site in enumerate("bc", 1)
    }
    found = dict(measurement().restyled(work_of(mine), {form: own}, others))
    assert list(found) == ["b", "c"]
    for site, pair in found.items():
        assert pair.shape == (2, *shape[1:])
        assert torch.equal(pair[0], mine[0])
        expected = transfer(mine[:1], others[f"{form}/{site}"], window(shape[2:], beta=0.1), 1.0, keep="none")
        assert torch.equal(pair[1], expected[0])
        assert not torch.equal(pair[0], pair[1])
    still = dict(measurement(lam=0.0).restyled(work_of(mine), {form: own}, others))
    assert all(torch.equal(pair[0], pair[1]) for pair in still.values())


def test_a_bank_shows_one_of_its_entries_and_always_the_same():
    mine = images_of("mine", 3, 1, 8, 8)
    form, bank = measure_style([mine], beta=0.1, bank=3, generator=generator("bank"))
    (_, first), (_, again) = (
        next(measurement().restyled(work_of(mine), {form: bank}, {f"{form}/b": bank})) for _ in range(2)
    )
    assert torch.equal(first, again)


def test_a_table_has_no_pictures():
    moments = {"moments": torch.ones(2, 3)}
    assert not list(
        measurement().restyled(work_of(torch.ones(4, 3)), moments, {"moments/b": torch.zeros(2, 3)})
    )


@pytest.fixture
def two(tmp_path):
    image_site(tmp_path / "data" / "alpha", 1)
    image_site(tmp_path / "data" / "beta", 2, gain=0.5, offset=90, wave=20)
    return Federation(tmp_path, ("alpha", "beta"))


def told(root, alias):
    return list(read_events(root / "home" / alias / "events.jsonl"))


@pytest.mark.slow
def test_pictures_lie_at_the_site_by_alias_and_nothing_of_them_leaves(two, tmp_path):
    settings = image_config(beta=0.1, keep="none")
    two.run(settings)
    for alias, other in (("alpha", "beta"), ("beta", "alpha")):
        folder = tmp_path / "home" / alias / "styles"
        assert [path.name for path in folder.iterdir()] == [f"{other}.png"]
        with Image.open(folder / f"{other}.png") as picture:
            drawn = np.asarray(picture)
        width = (drawn.shape[1] - 2 * GAP) // 3
        before, after, change = (
            drawn[:, start : start + width] for start in (0, width + GAP, 2 * (width + GAP))
        )
        assert not np.array_equal(before, after)
        assert change.any()
        saved = [event for event in told(tmp_path, alias) if event["event"] == "styles.saved"]
        assert [(event["round"], event["count"]) for event in saved] == [(2, 1)]
        assert all(
            event.keys() <= {"v", "t", "process", "site", "event", "round", "count"} for event in saved
        )
    files = {alias: (tmp_path / "home" / alias / "styles").glob("*.png") for alias in two.aliases}
    bytes_ = {alias: [path.read_bytes() for path in paths] for alias, paths in files.items()}
    specs = {spec.name for spec in make_halves(get_method(settings.method), settings)[0].uplink}
    for alias, number, _, answer in two.link.seen:
        if number > 0:
            assert set(decode(answer).payloads) <= specs
        raw = b"".join(bytes(part) for part in answer.values())
        assert not any(data[64:192] in raw for data in bytes_[alias])
    assert "styles.saved" not in {event["event"] for event in two.events()}
    two.run(settings, home="again")
    for alias, other in (("alpha", "beta"), ("beta", "alpha")):
        assert [(tmp_path / "again" / alias / "styles" / f"{other}.png").read_bytes()] == bytes_[alias]


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_costs_no_round(two, tmp_path, monkeypatch):
    def full(folder, samples, **_):
        return list(samples) and hurt()

    def hurt():
        raise StorageError("The volume cannot be written (it is full).")

    def broken(folder, samples, **_):
        return [1 / 0 for _ in samples]

    for place, failing in enumerate((full, broken)):
        monkeypatch.setattr("client.site.save_styles", failing)
        home = f"home-{place}"
        loop = two.run(image_config(beta=0.1), home=home)
        assert loop.done == 2
        assert all(len(log.cases) == 2 for log in loop.history)
        events = list(read_events(tmp_path / home / "alpha" / "events.jsonl"))
        warned = [event for event in events if event["event"] == "warning"]
        assert [(event["code"], event["round"]) for event in warned] == [(("storage", "internal")[place], 2)]
        assert "division" not in json.dumps(events)
        assert "styles.saved" not in {event["event"] for event in events}
