"""The diagonal Fisher information against one gradient after the other, closed forms and expectations."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.config import DataConfig, ModelConfig
from common.models import build_model
from common.numerics import diagonal_fisher as module
from common.numerics.diagonal_fisher import Likelihood, diagonal_fisher

CLASSES = 3
# name -> (patch, settings); no patch: a table
NETWORKS = {
    "unet 2D": ((8, 8), {"name": "unet", "width": 2, "levels": 2}),
    "unet 2D batch norm": ((8, 8), {"name": "unet", "width": 2, "levels": 2, "norm": "batch"}),
    "unet 3D": ((8, 8, 8), {"name": "unet", "width": 2, "levels": 2}),
    "unet 3D group norm": ((4, 8, 4), {"name": "unet", "width": 2, "levels": 2, "norm": "group"}),
    "mlp": ((), {"name": "mlp", "hidden": (5,)}),
    "logistic": ((), {"name": "logistic"}),
}


def build(which, dtype=torch.float64):
    patch, model = NETWORKS[which]
    data = DataConfig(
        task="segmentation" if patch else "tabular",
        spatial_dims=len(patch),
        channels=("a", "b"),
        labels=tuple("xyz"[:CLASSES]),
        patch=patch,
    )
    network = build_model(ModelConfig(**model), data, seed=0).to(dtype).eval()
    random = torch.Generator().manual_seed(3)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=random) + 0.5)
    return network


def samples(which, sizes=(3, 1, 2), seed=0):
    patch, random = NETWORKS[which][0], torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 2, *patch, generator=random, dtype=torch.float64),
            torch.randint(CLASSES, (n, 1, *patch) if patch else (n,), generator=random),
        )
        for n in sizes
    ]


def names_of(network):
    return [name for name, _ in network.named_parameters()]


def slow_fisher(network, names, batches):
    """One gradient after the other, added up parameter by parameter."""
    parameters = dict(network.named_parameters())
    total, count = {name: torch.zeros_like(parameters[name]) for name in names}, 0
    for inputs, target in batches:
        for x, y in zip(inputs, target, strict=True):
            labels = y if y.ndim else y.reshape(1)
            loss = functional.cross_entropy(network(x[None]), labels)  # the mean over voxels
            for name in names:
                (gradient,) = torch.autograd.grad(loss, parameters[name], retain_graph=True)
                total[name] += gradient**2
            count += 1
    return {name: value / count for name, value in total.items()}


def same(got, expected, rtol=1e-10):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == torch.float64
        assert got[name].shape == value.shape
        atol = rtol * float(value.max()) + 1e-25  # a bias before a normalisation has none, but for rounding
        assert torch.allclose(got[name], value.to(torch.float64), rtol=rtol, atol=atol), name


# ---- against the plain loop ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # vmap warns where it falls back to a slow loop of its own
@pytest.mark.parametrize("which", NETWORKS)
def test_both_ways_are_the_plain_loop(which, monkeypatch):
    network, batches = build(which), samples(which)
    expected = slow_fisher(network, names_of(network), batches)
    assert max(float(value.max()) for value in expected.values()) > 1e-8
    same(diagonal_fisher(network, names_of(network), lambda: batches, Likelihood(), way="loop"), expected)
    same(diagonal_fisher(network, names_of(network), lambda: batches, Likelihood()), expected)
    monkeypatch.setattr(module._Gradients, "_one", lambda *_: pytest.fail("vmap gave up"))
    same(diagonal_fisher(network, names_of(network), lambda: batches, Likelihood(), way="vmap"), expected)


def test_it_is_not_the_square_of_the_mean_gradient():
    network, batches = build("mlp"), samples("mlp", sizes=(6,))
    got = diagonal_fisher(network, names_of(network), lambda: batches, Likelihood())
    loss = functional.cross_entropy(network(batches[0][0]), batches[0][1])
    mean = torch.autograd.grad(loss, list(network.parameters()))
    for value, gradient in zip(got.values(), mean, strict=True):
        assert bool((value >= gradient**2 - 1e-15).all())
        assert float(value.sum()) > 1.5 * float((gradient**2).sum())


@pytest.mark.parametrize("memory", [1, 40_000, 1 << 30])
def test_neither_batches_nor_memory_change_the_result(memory):
    network, names = build("unet 2D"), names_of(build("unet 2D"))
    inputs, target = (torch.cat(parts) for parts in zip(*samples("unet 2D"), strict=True))
    whole = diagonal_fisher(network, names, lambda: [(inputs, target)], Likelihood(), way="loop")
    got = diagonal_fisher(
        network,
        names,
        lambda: samples("unet 2D", (3, 0, 1, 2)),
        Likelihood(),
        memory_bytes=memory,
        way="vmap",
    )
    same(got, whole)


def test_the_memory_bounds_the_micro_batch(monkeypatch):
    network, batches = build("unet 2D"), samples("unet 2D", sizes=(6,))
    widths = []
    every = module._Gradients._all
    monkeypatch.setattr(
        module._Gradients, "_all", lambda self, x, y: widths.append(len(x)) or every(self, x, y)
    )

    def run(memory):
        widths.clear()
        diagonal_fisher(
            network, names_of(network), lambda: batches, Likelihood(), memory_bytes=memory, way="vmap"
        )
        return list(widths)

    assert run(1) == [1] * 6
    assert run(1 << 30) == [6]
    size = 2 * 8 * sum(value.numel() for value in network.parameters())  # gradients alone
    fewest = run(4 * size)
    assert sum(fewest) == 6
    assert max(fewest) < 4


def test_a_subset_in_its_order_frozen_parameters_and_untouched_gradients():
    network, batches = build("unet 2D"), samples("unet 2D")
    names = names_of(network)[::-2]
    expected = slow_fisher(network, names, batches)
    network.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for way in ("vmap", "loop"):
        same(diagonal_fisher(network, names, lambda: batches, Likelihood(), way=way), expected)
    assert all(value.grad is None and not value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_float32_squares_are_added_in_float64():
    """A large sample and many small ones, whose squares a float32 sum would lose."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    inputs = torch.cat([torch.full((1, 1), 4096.0), torch.ones(999, 1)])
    got = diagonal_fisher(
        network, ["weight"], lambda: [(inputs, torch.ones(1000, 1))], Likelihood("mse"), memory_bytes=1000
    )
    assert float(got["weight"]) == (4096.0**2 + 999) / 1000
    assert float(torch.tensor(4096.0**2) + 1) == 4096.0**2  # in float32 each of them is lost


def test_parameters_without_influence_have_no_information():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x):
            return self.used(x)

    network, batches = Spare().double(), samples("logistic")
    for way in ("vmap", "loop"):
        got = diagonal_fisher(network, names_of(network), lambda: batches, Likelihood(), way=way)
        assert not got["spare.weight"].any()
        assert got["used.weight"].all()
        only = diagonal_fisher(network, ["spare.bias"], lambda: batches, Likelihood(), way=way)
        assert not only["spare.bias"].any()


def test_an_operation_that_cannot_be_vectorised_goes_sample_by_sample():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(2, CLASSES)

        def forward(self, x):
            return self.line(x) * (2.0 if float(x.sum()) > 0 else 1.0)

    network, batches = Branch().double(), samples("logistic", sizes=(5, 2))
    expected = slow_fisher(network, names_of(network), batches)
    for way in ("auto", "vmap"):
        same(diagonal_fisher(network, names_of(network), lambda: batches, Likelihood(), way=way), expected)


def test_a_large_model_on_few_values_takes_the_loop_by_itself(monkeypatch):
    used = []
    one, every = module._Gradients._one, module._Gradients._all
    monkeypatch.setattr(module._Gradients, "_one", lambda *a: used.append("loop") or one(*a))
    monkeypatch.setattr(module._Gradients, "_all", lambda *a: used.append("vmap") or every(*a))
    for width, way in ((100, "vmap"), (1200, "loop")):
        used.clear()
        network = nn.Sequential(nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 3))
        batches = samples("logistic", sizes=(2,))
        got = diagonal_fisher(network, ["1.weight"], lambda batches=batches: batches, Likelihood())
        assert set(used) == {way}
        assert got["1.weight"].shape == (width, width)


# ---- labels of the model's own ---------------------------------------------------------------------------------------


def test_sampled_labels_estimate_the_fisher_information_itself():
    """A logistic model: the exact diagonal is the mean of π_c (1 − π_c) x²."""
    network, n = build("logistic"), 6000
    x = samples("logistic", sizes=(4,))[0][0]
    wrong = torch.zeros(n, dtype=torch.int64)  # true labels must not matter
    inputs = x.repeat(n // 4, 1)
    weight, bias = names_of(network)
    got = diagonal_fisher(
        network, [weight, bias], lambda: [(inputs, wrong)], Likelihood(), variant="sampled",
        draw=Likelihood().draw, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    chance = network(x).softmax(dim=1).detach()
    exact = (chance * (1 - chance)).T @ x**2 / 4
    assert torch.allclose(got[weight], exact, rtol=0.1)
    assert torch.allclose(got[bias], (chance * (1 - chance)).mean(dim=0), rtol=0.1)
    true = diagonal_fisher(network, [weight], lambda: [(inputs, wrong)], Likelihood())
    assert not torch.allclose(true[weight], exact, rtol=0.2)


@pytest.mark.parametrize("which", ["unet 2D", "mlp"])
def test_sampled_labels_depend_on_the_seed_and_not_on_batches_or_ways(which):
    network = build(which)

    def run(seed, sizes, **settings):
        inputs, target = (torch.cat(parts) for parts in zip(*samples(which), strict=True))
        cut = lambda: list(zip(inputs.split(sizes), target.split(sizes), strict=True))  # noqa: E731
        return diagonal_fisher(
            network, names_of(network), cut, Likelihood(), variant="sampled", draw=Likelihood().draw,
            generator=torch.Generator().manual_seed(seed), **settings,
        )  # fmt: skip

    state = torch.random.get_rng_state()
    first = run(1, 6)
    same(run(1, 2, way="loop"), first)
    same(run(1, 4, memory_bytes=1, way="vmap"), first)
    other = run(2, 6)
    assert any(not torch.allclose(other[name], value, rtol=1e-3) for name, value in first.items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "mse"])
def test_drawn_labels_have_the_models_distribution(kind):
    likelihood, n = Likelihood(kind), 40_000
    logits = torch.tensor([0.0, 1.5, -400.0, -1.0], dtype=torch.float64)
    output = logits.reshape(1, 4, 1).expand(1, 4, n)
    target = torch.zeros((1, 1, n) if kind == "softmax" else output.shape, dtype=torch.float64)
    target = target.long() if kind == "softmax" else target
    drawn = likelihood.draw(output, target, torch.Generator().manual_seed(0))
    assert drawn.shape == target.shape
    assert drawn.dtype == target.dtype
    if kind == "softmax":
        share, expected = functional.one_hot(drawn.flatten(), 4).double().mean(dim=0), logits.softmax(dim=0)
    else:
        share, expected = drawn[0].mean(dim=1), logits if kind == "mse" else logits.sigmoid()
    assert torch.allclose(share, expected, atol=5 * 1.0 / math.sqrt(n))
    if kind == "mse":
        assert torch.allclose(drawn[0].var(dim=1), torch.ones(4, dtype=torch.float64), atol=0.05)
    else:
        assert float(share[2]) == 0


# ---- likelihoods -----------------------------------------------------------------------------------------------------


def test_losses_by_sample_are_torchs_means():
    random = torch.Generator().manual_seed(0)
    output = torch.randn(3, 4, 5, 2, generator=random, dtype=torch.float64)
    labels = torch.randint(4, (3, 5, 2), generator=random)
    for target in (labels, labels[:, None]):
        expected = functional.cross_entropy(output, labels, reduction="none").mean(dim=(1, 2))
        assert torch.allclose(Likelihood()(output, target), expected)
    known = labels.clone()
    known[0, :3], known[1] = 255, 255
    expected = [
        functional.cross_entropy(output[n : n + 1], known[n : n + 1], ignore_index=255) for n in (0, 2)
    ]
    got = Likelihood(ignore_index=255)(output, known)
    assert got.tolist() == pytest.approx([float(expected[0]), 0.0, float(expected[1])])
    values = torch.rand(output.shape, generator=random, dtype=torch.float64)
    each = functional.binary_cross_entropy_with_logits(output, values, reduction="none")
    assert torch.allclose(Likelihood("bernoulli")(output, values), each.sum(dim=1).mean(dim=(1, 2)))
    half = 0.5 * (output - values).square()
    assert torch.allclose(Likelihood("mse")(output, values), half.sum(dim=1).mean(dim=(1, 2)))
    drawn = Likelihood(ignore_index=255).draw(output, known, torch.Generator().manual_seed(0))
    assert torch.equal(drawn == 255, known == 255)


@pytest.mark.parametrize("label", [-1, CLASSES, 255])
@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_a_label_out_of_range_is_found(label, way):
    network, batches = build("logistic"), samples("logistic")
    batches[1][1][0] = label
    with pytest.raises(ValueError, match="labels are in range"):
        diagonal_fisher(network, names_of(network), lambda: batches, Likelihood(), way=way)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    network, batches = build("unet 2D batch norm"), samples("unet 2D")
    names, likelihood, random = names_of(network), Likelihood(), torch.Generator()

    def run(network=network, names=names, batches=batches, **settings):
        return diagonal_fisher(network, names, lambda: batches, likelihood, **settings)

    odd = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Conv2d(2, 3, 1)).double().eval()
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3).double()).eval()
    infinite = [(batches[0][0] * math.inf, batches[0][1])]
    wrong = {
        "evaluation mode": lambda: run(build("unet 2D batch norm").train()),
        "running statistics": lambda: run(odd, names_of(odd)),
        "one dtype": lambda: run(mixed, names_of(mixed)),
        "each once": lambda: run(names=[]),
        "unknown": lambda: run(names=["model.9.weight"]),
        "got 2": lambda: run(names=[names[0]] * 2),
        "at least one sample": lambda: run(batches=[]),
        "as many targets": lambda: run(batches=[(batches[0][0], batches[1][1])]),
        "not finite": lambda: run(batches=infinite),
        "variant": lambda: run(variant="true"),
        "way": lambda: run(way="fast"),
        "need 'draw'": lambda: run(variant="sampled", draw=likelihood.draw),
        "go without": lambda: run(draw=likelihood.draw, generator=random),
        "at least 1 byte": lambda: run(memory_bytes=0),
        "likelihood must be": lambda: Likelihood("poisson"),
        "needs targets \\(1, 8, 8\\)": lambda: run(batches=[(batches[0][0], batches[0][1][:, 0, :7])]),
        "needs targets \\(2, 1\\)": lambda: Likelihood("mse")(torch.zeros(2, 1), torch.zeros(2)),
        "no target value": lambda: Likelihood("mse", ignore_index=3),
    }
    for words, attempt in wrong.items():
        with pytest.raises(ValueError, match=words):
            attempt()


def test_progress_is_told_and_can_stop_the_pass():
    network, batches = build("logistic"), samples("logistic")
    calls = []
    diagonal_fisher(
        network, names_of(network), lambda: batches, Likelihood(), on_batch=lambda: calls.append(1)
    )
    assert len(calls) == len(batches)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        diagonal_fisher(network, names_of(network), lambda: batches, Likelihood(), on_batch=stop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["empirical", "sampled"])
def test_cuda_gives_what_the_cpu_gives(variant):
    likelihood, found = Likelihood(), {}
    for device in ("cpu", "cuda"):
        network = build("unet 3D").to(device)
        settings = {"draw": likelihood.draw, "generator": torch.Generator().manual_seed(1)}
        got = diagonal_fisher(
            network, names_of(network), lambda: samples("unet 3D"), likelihood, variant=variant,
            **(settings if variant == "sampled" else {}),
        )  # fmt: skip
        found[device] = {name: value.cpu() for name, value in got.items()}
    same(found["cuda"], found["cpu"], rtol=1e-8)
