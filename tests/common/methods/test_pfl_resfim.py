"""pFL-ResFIM on real sites and the real round loop, against means formed value by value from what crossed the wire."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from client.site_config import Policy
from common import resfim
from common.config import RunConfig
from common.errors import WardroundError
from common.models import build_model
from common.payload import Kind
from common.store import tensor_bytes
from common.wire import ROUND, bytes_by_kind, decode, encode
from tests.common.methods.resfim_lab import Lab, advance, config, guarded, table, three_sites
from tests.harness import Federation

pytestmark = pytest.mark.slow


@pytest.fixture
def lab():
    return three_sites()


def replies(loop, number):
    return {alias: answer for alias, round_, _, answer in loop.seen if round_ == number}


def questions(loop, number):
    return {alias: question for alias, round_, question, _ in loop.seen if round_ == number}


def masks_of(answer, like):
    """Return a site's mask from what it sent, flat, over all parameters."""
    found = resfim.unpack_masks(answer.payloads["sensitive"].tensors, like, who="x")
    return {
        name: found.get(name, torch.zeros(tensor.shape, dtype=torch.bool)) for name, tensor in like.items()
    }


def site_mask(loop, alias, number):
    return loop.states[alias][number].part("mask")


def same(first, second):
    return tensor_bytes(first) == tensor_bytes(second)


@pytest.mark.parametrize("neutral", [{"rho": 0.0}, {"lam": 0.0}])
def test_nothing_sensitive_is_fedavg_to_the_bit(lab, neutral):
    ours = lab.run(config(hidden=(8,), local=(), **neutral))
    average = lab.run(config(method="fedavg", hidden=(8,)))
    assert same(ours.state.part("model"), average.state.part("model"))
    assert all(same(model, average.state.part("model")) for model in ours.personal.values())


def test_rho_0_sends_what_fedavg_sends_and_takes_its_guards(lab):
    median = lab.run(guarded(config(1, rho=0.0), reduce="median"))
    assert set(replies(median, 1)["b"].payloads) == {"model"}
    fedavg = lab.run(guarded(config(1, method="fedavg"), reduce="median"))
    assert same(median.state.part("model"), fedavg.state.part("model"))


@pytest.mark.parametrize(
    "params", [{"rho": 1.0}, {"soft": True}, {"tau": 0.3}, {"aggregate": "intersection"}]
)
def test_the_rounds_before_the_first_mask_are_fedavg_to_the_bit(lab, params):
    ours = lab.start(config(4, hidden=(8,), first=3, **params))
    average = lab.start(config(4, method="fedavg", hidden=(8,)))
    assert same(advance(ours, 2).part("model"), advance(average, 2).part("model"))
    ours.state, average.state = ours.round(3), average.round(3)
    assert not same(ours.state.part("model"), average.state.part("model"))


def test_rho_1_from_the_first_round_is_local_training_to_the_bit(lab):
    ours = lab.run(config(hidden=(8,), rho=1.0, first=1))
    assert all(not answer.payloads["model"].tensors for answer in replies(ours, 2).values())
    assert same(ours.state.part("model"), ours.initial)
    local = lab.run(config(method="local-only", hidden=(8,)))
    assert all(same(ours.personal[alias], local.personal[alias]) for alias in lab.aliases)
    assert not same(ours.personal["a"], ours.personal["b"])


@pytest.mark.parametrize("aggregate", ["holders", "intersection"])
def test_a_round_is_the_mean_over_whoever_shares_each_value(lab, aggregate):
    loop = lab.start(config(4, hidden=(8,), rho=0.6, aggregate=aggregate))
    before = advance(loop, 2).part("model")
    after = loop.round(3).part("model")
    answers = replies(loop, 3)
    whole = sum(answer.cases for answer in answers.values())
    kept = 0
    for name, old in before.items():
        expected = old.double().reshape(-1).clone()
        masks = {alias: masks_of(answer, before)[name].reshape(-1) for alias, answer in answers.items()}
        for place in range(len(expected)):
            total, cases = 0.0, 0
            for alias, answer in answers.items():
                if not masks[alias][place]:
                    values = answer.payloads["model"].tensors[name].reshape(-1)
                    total += answer.cases * float(values[int((~masks[alias][:place]).sum())])
                    cases += answer.cases
            if cases and (aggregate == "holders" or cases == whole):
                expected[place] = total / cases
            else:
                kept += 1
        assert torch.equal(after[name].reshape(-1), expected.float())
    assert kept > 0


@pytest.mark.parametrize("aggregate", ["holders", "all", "intersection"])
def test_a_site_keeps_its_own_where_sensitive_and_takes_the_mean_elsewhere(lab, aggregate):
    loop = lab.run(config(3, hidden=(8,), rho=0.4, aggregate=aggregate))
    model = loop.state.part("model")
    unshared = resfim.unpack_masks(loop.state.part("unshared"), model, who="x")
    assert bool(unshared) == (aggregate == "intersection")
    differing = 0
    for alias, personal in loop.personal.items():
        own, mask = loop.states[alias][3].part("own"), site_mask(loop, alias, 3)
        for name, tensor in personal.items():
            stays = mask[name] | unshared.get(name, torch.zeros_like(mask[name]))
            assert torch.equal(tensor, torch.where(stays, own[name], model[name]))
            differing += int((own[name] != model[name])[stays].sum())
    assert differing > 0


def test_over_all_sites_the_mean_is_fedavgs_of_what_was_sent_and_the_guard_holds(lab):
    loop = lab.start(guarded(config(3, hidden=(8,), aggregate="all"), reduce="median"))
    advance(loop, 2)
    after = loop.round(3).part("model")
    answers = replies(loop, 3).values()
    assert all("sensitive" not in answer.payloads for answer in answers)
    for name, tensor in after.items():
        stack = torch.stack([answer.payloads["model"].tensors[name] for answer in answers])
        assert torch.equal(tensor, stack.median(dim=0).values)


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.75])
def test_masks_are_exact_in_count_and_fewer_bytes_leave(lab, rho):
    loop = lab.run(config(2, hidden=(64,), rho=rho))
    like = loop.state.part("model")
    size = sum(tensor.numel() for tensor in like.values())
    sensitive = int(np.ceil(rho * size - 1e-9))
    for alias, answer in replies(loop, 2).items():
        masks = masks_of(answer, like)
        assert sum(int(mask.sum()) for mask in masks.values()) == sensitive
        assert all(torch.equal(mask, site_mask(loop, alias, 2)[name]) for name, mask in masks.items())
        kinds = bytes_by_kind(encode(answer))
        assert kinds[str(Kind.MODEL)] == 4 * (size - sensitive)
        assert kinds[str(Kind.SENSITIVITY_MASK)] < 0.2 * size
    shares = loop.states["b"][2].values
    assert shares["sensitive/"] == sensitive / size
    assert {"sensitive/body.0", "sensitive/out"} < shares.keys()


def test_a_style_is_sent_once_and_goes_to_the_others_only(lab):
    loop = lab.run(config(4))
    for number in (1, 2, 3, 4):
        sent = {alias for alias, answer in replies(loop, number).items() if "style" in answer.payloads}
        assert sent == (set(lab.aliases) if number == 1 else set())
    own = {alias: answer.payloads["style"].tensors for alias, answer in replies(loop, 1).items()}
    for alias, question in questions(loop, 3).items():
        got = question.payloads["styles"].tensors
        assert set(got) == {f"moments/{other}" for other in lab.aliases if other != alias}
        for name, tensor in got.items():
            assert torch.equal(tensor, own[name[-1]]["moments"])
    assert all("styles" not in question.payloads for question in questions(loop, 5).values())


def test_a_style_that_was_lost_is_asked_for_again_and_a_missing_sites_stays(lab):
    loop = lab.run(
        config(4), tamper=lambda alias, number, sent: None if alias == "b" and number in (1, 3) else sent
    )
    assert [alias for alias, answer in replies(loop, 2).items() if "style" in answer.payloads] == ["b"]
    assert set(questions(loop, 2)["a"].payloads["styles"].tensors) == {"moments/c"}
    # a site that has just come gets the others' at once, and its own stays while it is missing
    assert set(questions(loop, 2)["b"].payloads["styles"].tensors) == {"moments/a", "moments/c"}
    assert "moments/b" in questions(loop, 4)["a"].payloads["styles"].tensors


def test_a_site_that_comes_after_the_last_measurement_still_gets_a_mask(lab):
    loop = lab.run(
        config(5, hidden=(8,), freeze_after=2),
        tamper=lambda alias, number, sent: None if alias == "c" and number < 4 else sent,
    )
    assert [number for number in range(1, 6) if "styles" in questions(loop, number)["a"].payloads] == [2]
    assert [number for number in range(1, 6) if "styles" in questions(loop, number)["c"].payloads] == [
        2,
        3,
        4,
    ]


def test_the_schedule_says_when_masks_are_measured(lab):
    loop = lab.run(config(7, hidden=(8,), first=3, every=2, freeze_after=5))
    asked = [number for number in range(1, 9) if "styles" in questions(loop, number)["a"].payloads]
    assert asked == [3, 5]
    codes = [tensor_bytes(replies(loop, number)["a"].payloads["sensitive"].tensors) for number in range(1, 8)]
    assert codes[0] == codes[1] == tensor_bytes({})
    assert codes[2] == codes[3] != codes[1]
    assert codes[4] == codes[5] == codes[6] != codes[2]


def test_fewer_styles_than_sites_may_be_used():
    five = Lab({name: table(place) for place, name in enumerate("abcde")})
    loop = five.run(config(4, styles=2))
    drawn = [frozenset(questions(loop, number)["a"].payloads["styles"].tensors) for number in range(2, 5)]
    assert all(len(names) == 2 and "moments/a" not in names for names in drawn)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_sites_alike_find_nothing_sensitive_and_a_shifted_column_is_found(hidden):
    alike = Lab({"a": table(1, rows=60), "b": table(1, rows=60)})
    ours = alike.run(config(2, hidden=hidden))
    average = alike.run(config(2, method="fedavg", hidden=hidden)).state.part("model")
    for alias in alike.aliases:
        assert not any(bool(mask.any()) for mask in site_mask(ours, alias, 2).values())
        assert same(ours.personal[alias], average)
    shifted = Lab({"a": table(1, rows=60), "b": table(1, rows=60, gain=2.0, offset=2.0)})
    # smoothing keeps the residuals in the site's state, where they can be looked at
    loop = shifted.run(config(2, hidden=hidden, smoothing=0.5, rho=0.25, normalise="global"))
    first = "body.0.weight" if hidden else "linear.weight"
    for alias in shifted.aliases:
        columns = loop.states[alias][2].part("residual")[first].mean(dim=0)
        assert columns.argmax() == 0
        assert columns[0] > 2 * columns[1:].max()
        mask = site_mask(loop, alias, 2)[first].double().mean(dim=0)
        assert mask[0] > mask[1:].mean()


def test_the_residual_is_that_of_gradients_taken_row_by_row(lab):
    loop = lab.run(config(2, hidden=(8,), smoothing=0.5, samples=1000))
    state = loop.states["b"][2]
    network = build_model(loop.config.model, loop.config.data, seed=0).double()
    network.load_state_dict({name: tensor.double() for name, tensor in state.part("own").items()})
    rows, labels = lab.tables["b"][0].double(), lab.tables["b"][1]
    m, s = rows.mean(dim=0), rows.std(dim=0, correction=0)

    def fisher(x):
        total = [torch.zeros_like(value) for value in network.parameters()]
        for one, label in zip(x, labels, strict=True):
            loss = torch.nn.functional.cross_entropy(network(one[None]), label[None])
            for sum_, gradient in zip(
                total, torch.autograd.grad(loss, list(network.parameters())), strict=True
            ):
                sum_ += gradient**2
        return [value / len(x) for value in total]

    real = fisher(rows)
    styles = questions(loop, 2)["b"].payloads["styles"].tensors
    expected = [torch.zeros_like(value) for value in real]
    for mean, spread in styles.values():
        for sum_, value, other in zip(expected, real, fisher((rows - m) / s * spread + mean), strict=True):
            sum_ += (other - value).abs() / len(styles)
    assert len(styles) == 2
    for (name, _), value in zip(network.named_parameters(), expected, strict=True):
        got = state.part("residual")[name].double()
        torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-6 * float(value.max()))


CHOICES = [
    {"soft": True},
    {"tau": 0.05, "rho": 0.0},
    {"variant": "sampled"},
    {"residual": "signed"},
    {"residual": "relative"},
    {"over_sites": "max"},
    {"smoothing": 0.5},
    {"normalise": "tensor"},
    {"samples": 4},
    {"aggregate": "intersection"},
]


def test_every_choice_makes_a_difference_and_drawn_labels_are_drawn_again(lab):
    found = []
    for params in [{}, *CHOICES]:
        loop = lab.run(config(3 if "smoothing" in params else 2, hidden=(8,), **params))
        found.append(b"".join(tensor_bytes(loop.personal[alias]) for alias in lab.aliases))
    assert len(set(found)) == len(found)
    again = lab.run(config(2, hidden=(8,), variant="sampled"))
    assert b"".join(tensor_bytes(again.personal[alias]) for alias in lab.aliases) in found


@pytest.mark.parametrize("params", [{"soft": True, "smoothing": 0.5}, {"aggregate": "intersection"}])
def test_masks_resume_to_the_bit_on_real_sites(tmp_path, params):
    two = Federation(tmp_path, ("alpha", "beta"))
    settings = config(3, hidden=(8,), **params)
    whole = two.run(settings, home="whole")
    cut = two.start(settings, home="cut")
    for number in (1, 2):
        cut.state = cut.round(number)
        cut.checkpoints.write(number, cut.state)
    cut.round(3)
    resumed = two.start(settings, home="cut")
    assert resumed.resume()
    resumed.execute()
    assert same(resumed.state.tensors, whole.state.tensors)
    assert resumed.state.values == whole.state.values
    ours, again = two.personal("whole"), two.personal("cut")
    assert all(same(ours[alias], again[alias]) for alias in two.aliases)


def test_soft_masks_weigh_every_value(lab):
    loop = lab.start(config(4, hidden=(8,), soft=True))
    before = advance(loop, 2).part("model")
    loop.state = loop.round(3)
    answers = replies(loop, 3).values()
    for name, old in before.items():
        shares = [answer.payloads["sensitive"].tensors[name].double() / 255 for answer in answers]
        weights = [answer.cases * share for answer, share in zip(answers, shares, strict=True)]
        terms = [
            answer.payloads["model"].tensors[name].double() * weight
            for answer, weight in zip(answers, weights, strict=True)
        ]
        expected = torch.where(sum(weights) > 0, sum(terms) / sum(weights), old.double())
        torch.testing.assert_close(loop.state.part("model")[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert all(0 <= float(share.min()) < 1 for share in shares)
    question, _, state = loop.ask("a", 4, ROUND)
    for name, tensor in loop.half.start(question.payloads, state).items():
        share = state.part("mask")[name].double() / 255
        mixed = share * question.payloads["model"].tensors[name] + (1 - share) * state.part("own")[name]
        torch.testing.assert_close(tensor.double(), mixed, rtol=1e-6, atol=1e-7)


def image_site(folder, seed, *, gain=1.0, offset=0.0, wave=0.0, cases=8, size=20):
    """Write grey pictures of a bright square, with a gain, an offset and a slow wave over them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    listed = []
    for index in range(cases):
        mask = np.zeros((size, size), bool)
        x, y = rng.integers(2, size - 8, 2)
        mask[x : x + 6, y : y + 6] = True
        image = 60 + 60 * mask + rng.normal(scale=8, size=(size, size))
        image = gain * image + offset + wave * np.sin(2 * np.pi * np.arange(size) / 16)[:, None]
        names = f"{index}.png", f"{index}_mask.png"
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / names[0])
        Image.fromarray(mask).save(folder / names[1])
        listed.append({"image": names[0], "label": names[1]})
    labels = {"0": "background", "1": "square"}
    description = {"name": "tiny", "modality": {"0": "grey"}, "labels": labels, "training": listed}
    (folder / "dataset.json").write_text(json.dumps(description))


def image_config(**params):
    return RunConfig.from_mapping(
        {
            "method": "pfl-resfim", "params": params,
            "data": {"spatial_dims": 2, "channels": ["grey"], "labels": ["background", "square"], "patch": [16, 16],
                     "patches_per_case": 1, "normalise": "range", "augment": False},
            "model": {"name": "unet", "width": 4, "levels": 2, "norm": "batch"},
            "train": {"batch_size": 4, "lr": 0.01},
            "rounds": {"rounds": 2, "poll": 0.001, "hd95": "never"},
        }
    )  # fmt: skip


@pytest.mark.parametrize("params", [{"beta": 0.1}, {"style": "bank", "bank": 3, "reference": "own"}])
def test_pictures_travel_as_spectra_and_batch_statistics_stay(tmp_path, params):
    image_site(tmp_path / "data" / "alpha", 1)
    image_site(tmp_path / "data" / "beta", 2, gain=0.5, offset=90, wave=20)
    two = Federation(tmp_path, ("alpha", "beta"))
    loop = two.run(image_config(samples=4, **params))
    values = (3 * 3 + 1) // 2  # b is ⌊0.1 · 16⌋, and at least 1
    answers = {number: decode(answer) for alias, number, _, answer in two.link.seen if alias == "beta"}
    style = answers[1].payloads["style"].tensors["amplitude"]
    assert style.shape == ((3, 1, values) if "bank" in params else (1, values))
    model = loop.state.part("model")
    assert not any("running" in name or "num_batches" in name for name in model)
    size = sum(tensor.numel() for tensor in model.values())
    sent = sum(tensor.numel() for tensor in answers[2].payloads["model"].tensors.values())
    assert sent == size - int(np.ceil(0.2 * size - 1e-9))
    first, second = two.personal().values()
    assert any(not torch.equal(first[name], second[name]) for name in first if "running" in name)


def test_a_policy_without_style_spectrum_refuses_by_name(tmp_path):
    strict = Federation(tmp_path, ("alpha", "beta"), policy=Policy(kinds=("model", "sensitivity-mask")))
    with pytest.raises(WardroundError, match="style-spectrum"):
        strict.run(config())
    assert strict.run(config(1, rho=1.0), home="b").done == 1
