"""pFL-ResFIM on a GPU: the same styles, images, Fisher information, residuals and masks as on the CPU, and results there.

TF32 is off where float32 is compared: it rounds a convolution's inputs to ten bits, and what is checked here is the code.
"""

import pytest
import torch

from client.trainer import Trainer
from common.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from common.method import RoundContext, make_halves
from common.methods import get_method
from common.methods.pfl_resfim import WANTED, ResFIMParams
from common.models import build_model, parameter_groups
from common.numerics.diagonal_fisher import Likelihood, diagonal_fisher
from common.numerics.residual import normalise, overlap, sensitive_fraction
from common.numerics.rng import generator
from common.numerics.spectrum import amplitudes, bank_of, style_of, transfer, window
from common.payload import Kind, Payload
from common.sensitivity import MOMENTS, SPECTRUM, matched, measure_style
from common.tasks import get_task
from tests.common.methods.resfim_lab import Rows

DEVICE = "cuda"
PATCHES = {2: (12, 10), 3: (8, 8, 8)}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def whole_float32():
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, setting in zip(backends, before, strict=True):
        backend.allow_tf32 = setting


def images(dims, *, count=6, seed=0, dtype=torch.float32):
    """Return smooth bright images: a style of theirs differs from that of noise."""
    drawn = generator("gpu", dims, seed)
    x = torch.randn(count, 2, *PATCHES[dims], generator=drawn, dtype=dtype)
    return x + (0.5 + seed) * torch.linspace(0, 1, PATCHES[dims][-1], dtype=dtype)


def labels(x, seed=0):
    return torch.randint(0, 3, (len(x), 1, *x.shape[2:]), generator=generator("gpu labels", seed))


def close(got, want, *, tolerance):
    """Compare, after the way to the CPU, against the largest value."""
    scale = float(want.abs().max())
    assert scale > 0
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=tolerance * scale)


def work(dims, device, *, double=False, cases=6, **params):
    """Return a trainer over images on a device, and the site half."""
    data = DataConfig(
        task="segmentation", spatial_dims=dims, channels=("a", "b"), labels=("x", "y", "z"), patch=PATCHES[dims]
    )  # fmt: skip
    config = RunConfig(
        method="pfl-resfim", params=params, data=data, model=ModelConfig(name="unet", width=4, levels=2),
        train=TrainConfig(batch_size=2, lr=0.01),
    )  # fmt: skip
    network = build_model(config.model, config.data, seed=3)
    x = images(dims, count=cases)
    made = Trainer(
        config, Rows("alpha", x, labels(x)), network.double() if double else network, parameter_groups(network),
        get_task(config.data, config.train), device=torch.device(device), amp=False, check_cancelled=lambda: None,
        on_progress=lambda *_: None,
    )  # fmt: skip
    made.begin(RoundContext("run", 2, 3, 3, "alpha"))
    return made, make_halves(get_method("pfl-resfim"), config)[1]


def other_style(dims, beta, bank=0):
    drawn = generator("gpu bank")
    return measure_style([images(dims, seed=4)], beta=beta, bank=bank, generator=drawn)[1]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("keep", ["clip", "rescale", "none"])
def test_transfer(dims, dtype, tolerance, keep):
    x = images(dims, dtype=dtype)
    bins = window(x.shape[2:], beta=0.2)
    theirs = style_of([images(dims, seed=4, dtype=dtype)], bins)
    share = torch.linspace(0, 1, len(x))
    want = transfer(x, theirs, bins, share, keep=keep)
    got = transfer(
        x.to(DEVICE), theirs, bins, share, keep=keep
    )  # a style comes from the wire, so from the CPU
    assert got.device.type == DEVICE
    assert got.dtype == dtype
    close(got, want, tolerance=tolerance)
    assert torch.equal(got[0].cpu(), x[0]), "λ = 0 gives the image back to the bit"
    assert not torch.allclose(want[-1], x[-1], atol=0.01)


@pytest.mark.parametrize("dims", [2, 3])
def test_amplitudes_styles_and_banks(dims):
    x = images(dims, count=7)
    bins = window(x.shape[2:], beta=0.2)
    there = list(x.to(DEVICE).split(3))
    close(amplitudes(x.to(DEVICE), bins), amplitudes(x, bins), tolerance=1e-6)
    close(style_of(there, bins), style_of([x], bins), tolerance=1e-6)
    drawn = [bank_of(batches, bins, 3, generator("bank")) for batches in (there, list(x.split(3)))]
    close(*drawn, tolerance=1e-6)


@pytest.mark.parametrize("bank", [0, 3])
def test_a_site_sends_its_style_from_the_cpu(bank):
    x = images(3)
    (form, got), (_, want) = (
        measure_style(x.to(device).split(2), beta=0.2, bank=bank, generator=generator("bank"))
        for device in (DEVICE, "cpu")
    )
    assert (form, got.device.type, got.dtype) == (SPECTRUM, "cpu", torch.float32)
    close(got, want, tolerance=1e-6)


def test_moments_of_tables_and_rows_in_anothers():
    drawn = generator("gpu rows")
    x = torch.randn(20, 3, generator=drawn) * torch.tensor([1.0, 5.0, 0.0]) + 2
    other = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.5, 1.0]])
    (form, got), (_, want) = (
        measure_style(x.to(device).split(7), beta=0.1, bank=0, generator=drawn) for device in (DEVICE, "cpu")
    )
    assert (form, got.device.type) == (MOMENTS, "cpu")
    close(got, want, tolerance=1e-6)
    moved = matched(x.to(DEVICE), got, other, 0.7)
    assert moved.device.type == DEVICE
    close(moved, matched(x, want, other, 0.7), tolerance=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("way", ["vmap", "loop", "auto"])
@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-3), (True, 1e-9)])
def test_diagonal_fisher(dims, way, double, tolerance):
    x = images(dims)
    batches = list(zip(x.split(4), labels(x).split(4), strict=True))
    found = []
    for device in ("cpu", DEVICE):
        made, _ = work(dims, device, double=double)
        names = [name for name, _ in made.model.named_parameters()]
        with made.inspecting() as network:
            found.append(diagonal_fisher(network, names, lambda: batches, Likelihood(), way=way))
        assert all(value.device.type == device for value in found[-1].values())
        assert all(value.dtype == torch.float64 for value in found[-1].values())
    want, got = found
    most = max(float(value.max()) for value in want.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=0, atol=tolerance * most)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"variant": "sampled"},
        {"reference": "own", "over_sites": "max"},
        {"residual": "relative", "keep": "rescale"},
        {"style": "bank", "bank": 3, "beta": 0.1},
    ],
    ids=str,
)
def test_residual_and_mask(dims, params):
    """The network is float64, so what differs is the float32 transform alone: the residual, and nearly the whole mask, agree."""
    params = ResFIMParams(**{"beta": 0.1, "samples": 5, **params})
    others = {f"{SPECTRUM}/{name}": other_style(dims, params.beta, params.most) for name in ("beta", "gamma")}
    others[f"{SPECTRUM}/gamma"] = others[f"{SPECTRUM}/gamma"] * 1.5
    found = []
    for device in ("cpu", DEVICE):
        made, _ = work(dims, device, double=True)
        _, own = measure_style(
            (x for x, _ in made.samples(6)), beta=params.beta, bank=params.most, generator=generator("own")
        )
        names = [name for name, _ in made.model.named_parameters()]
        found.append(params.measurement.residual(made, names, {SPECTRUM: own}, others))
        assert all(value.device.type == "cpu" for value in found[-1].values())
        assert all(value.dtype == torch.float64 for value in found[-1].values())
    want, got = found
    assert any(value.any() for value in want.values())
    for name, value in want.items():
        if value.any():
            close(got[name], value, tolerance=1e-3)
    masks = [sensitive_fraction(normalise(each), 0.2) for each in found]
    assert float(overlap(masks)[0, 1]) > 0.98


@pytest.mark.parametrize("params", [{}, {"soft": True}, {"tau": 0.4}], ids=str)
def test_a_round_leaves_everything_on_the_cpu_and_repeats_to_the_bit(params):
    def once():
        made, half = work(2, DEVICE, samples=4, beta=0.1, **params)
        received = {
            "model": Payload("model", Kind.MODEL, made.weights(), meta={WANTED: True}),
            "styles": Payload("styles", Kind.STYLE_SPECTRUM, {f"{SPECTRUM}/beta": other_style(2, 0.1)}),
        }
        return half.train(made, received, half.init(made))

    result, again = once(), once()
    parts = {payload.name: payload.tensors for payload in result.payloads}
    assert parts.keys() == {"model", "sensitive", "style"}
    assert all(tensor.device.type == "cpu" for tensors in parts.values() for tensor in tensors.values())
    assert all(tensor.device.type == "cpu" for tensor in result.state.tensors.values())
    assert result.state.part("mask")
    for payload in again.payloads:
        for name, tensor in payload.tensors.items():
            assert torch.equal(tensor, parts[payload.name][name]), (payload.name, name)
