"""pFL-ResFIM: what is refused, by name and with the remedy, and the styles of tables and banks."""

import pytest
import torch

from common.errors import ConfigError
from common.methods.pfl_resfim import PFL_RESFIM, ResFIMServer
from common.models import build_model, parameter_groups
from common.numerics.rng import generator
from common.payload import Kind, Payload
from common.sensitivity import Measurement, matched, measure_style, moments_of
from common.work import RoundContext
from tests.common.methods.resfim_lab import advance, config, guarded, three_sites


@pytest.fixture
def lab():
    return three_sites()


def refusal(lab, change, *, number=2, **params):
    def tamper(alias, round_, payloads):
        if (alias, round_) == ("b", number):
            change(payloads)
        return payloads

    loop = lab.start(config(3, hidden=(8,), **params), tamper=tamper)
    advance(loop, number - 1)
    sentence = loop.refusal(number)
    assert sentence.startswith("b: ")
    return sentence


def test_values_and_masks_that_do_not_fit_are_refused_by_name(lab):
    def change(payload, name, value):
        def spoiled(payloads):
            tensors = payloads[payload].tensors
            tensors[name] = value(tensors.get(name))

        return spoiled

    first = "body.0.weight"
    assert "its mask leaves" in refusal(lab, change("model", first, lambda values: values[:-1]))
    assert "its mask leaves" in refusal(lab, change("model", first, lambda values: values.double()))
    assert "cannot be read" in refusal(lab, change("sensitive", first, lambda code: code[:-2]))
    assert "no coded mask" in refusal(lab, change("sensitive", first, lambda code: code.float()))
    assert "no coded mask" in refusal(
        lab, change("sensitive", "other", lambda _: torch.zeros(1, dtype=torch.uint8))
    )
    assert "lacks" in refusal(lab, lambda payloads: payloads["model"].tensors.pop(first))
    assert "brings" in refusal(lab, change("model", "other", lambda _: torch.zeros(1)))
    assert "soft mask" in refusal(lab, change("sensitive", first, lambda share: share.reshape(-1)), soft=True)
    assert "guard.update_ratio" in refusal(lab, change("model", first, lambda values: values + 1e4))


def test_a_style_out_of_its_place_or_form_is_refused_by_name(lab):
    def replace(tensors):
        return lambda payloads: payloads.update(style=Payload("style", Kind.STYLE_SPECTRUM, tensors))

    assert "needs the style" in refusal(lab, lambda payloads: payloads.pop("style"), number=1)
    assert "takes no style" in refusal(lab, replace({"moments": torch.ones(2, 3)}))
    assert "one tensor 'amplitude' or 'moments'" in refusal(lab, replace({"x": torch.ones(2, 3)}), number=1)
    assert "none here" in refusal(lab, replace({"moments": torch.ones(3, 3)}), number=1)
    assert "negative" in refusal(lab, replace({"moments": -torch.ones(2, 3)}), number=1)


def test_a_style_unlike_the_others_harms_its_sender_alone():
    server = ResFIMServer(PFL_RESFIM.parse({}))
    ctx = RoundContext("run", 2, 5, 0)
    shapes = {"a": (2, 9), "b": (2, 4), "c": (2, 4)}
    state = server._with_styles(
        server.init(*_network(), None),
        {site: {"moments": torch.ones(shape)} for site, shape in shapes.items()},
    )
    assert set(state.part("style")) == {"moments/a", "moments/b", "moments/c"}
    assert {site: set(server._styles(state, site, ctx)) for site in (*shapes, "new")} == {
        "a": set(), "b": {"moments/c"}, "c": {"moments/b"}, "new": {"moments/b", "moments/c"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="rebuilt"):
        PFL_RESFIM.parse({"style": "bank", "beta": 0.5})


def _network(**params):
    settings = config(hidden=(4,), **params)
    network = build_model(settings.model, settings.data, seed=0)
    return dict(network.state_dict()), parameter_groups(network)


def test_settings_that_cannot_work_are_refused_with_the_remedy():
    for params, words in (
        ({"soft": True, "tau": 0.1}, "neither tau"),
        ({"soft": True, "aggregate": "intersection"}, "intersection"),
        ({"first": 5, "freeze_after": 4}, "before first"),
    ):
        with pytest.raises(ConfigError, match=words):
            PFL_RESFIM.parse(params)
    for guard in ({"reduce": "median"}, {"outlier": 3.0}):
        server = ResFIMServer(PFL_RESFIM.parse({}))
        server.robust = guarded(config(), **guard).guard
        with pytest.raises(ConfigError, match="aggregate 'all'"):
            server.init(*_network(), None)
    with pytest.raises(ConfigError, match="leaves no parameter"):
        ResFIMServer(PFL_RESFIM.parse({"local": ["extractor", "head"]})).init(*_network(), None)
    with pytest.raises(ConfigError, match="single rows"):
        measure_style([torch.ones(3, 2)], beta=0.1, bank=2, generator=generator("x"))


def test_matched_moments_are_the_others_and_leave_what_is_the_same():
    rows = torch.randn(50, 3, generator=generator("rows"))
    rows[:, 2] = 7.0
    own = moments_of([rows[:20], rows[20:]])
    other = own.clone()
    other[:, 0] = torch.tensor([4.0, 2.5])
    other[:, 1] += 1e-7
    other[:, 2] = torch.tensor([5.0, 3.0])
    moved = matched(rows, own, other, 1.0)
    torch.testing.assert_close(moments_of([moved])[:, 0], other[:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(moved[:, 1], rows[:, 1])
    assert torch.equal(moved[:, 2], torch.full((50,), 5.0))
    assert torch.equal(matched(rows, own, other, 0.0), rows)


def test_a_bank_gives_every_image_one_of_its_entries_and_every_pass_the_same():
    images = torch.rand(6, 1, 8, 8, generator=generator("images"))
    form, bank = measure_style([images], beta=0.1, bank=2, generator=generator("bank"))
    assert (form, bank.shape) == ("amplitude", (2, 1, 5))
    how = Measurement(4, "empirical", "real", "abs", "mean", beta=0.1, lam=1.0, keep="none")
    first, again = (how.restyler(form, bank, bank, generator("drawn"))(images) for _ in range(2))
    assert torch.equal(first, again)
    single = [how.restyler(form, bank, entry, generator("drawn"))(images) for entry in bank]
    chosen = [[torch.allclose(first[n], each[n], atol=1e-5) for each in single] for n in range(6)]
    assert all(any(row) for row in chosen)
    assert {row.index(True) for row in chosen} == {0, 1}
