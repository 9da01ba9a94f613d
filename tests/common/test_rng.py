"""Seeds: the same everywhere and for ever, different for different words; global generators left as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics.rng import derive_seed, forked_torch_rng, generator

PART = st.one_of(st.text(max_size=8), st.integers(-(10**20), 10**20))


def test_a_seed_is_the_same_for_ever():
    # a change of the derivation would silently change every run that is resumed
    assert derive_seed("batches", 7, "alpha", 3) == 2846879541890207337


@settings(max_examples=50)
@given(st.lists(PART, max_size=4), st.lists(PART, max_size=4))
def test_different_words_give_different_seeds_in_range(first, second):
    seeds = derive_seed(*first), derive_seed(*second)
    assert all(0 <= seed < 2**63 for seed in seeds)
    alike = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert (seeds[0] == seeds[1]) == alike


@pytest.mark.parametrize("part", [1.0, True, None, b"a"])
def test_what_has_no_one_text_form_is_refused(part):
    with pytest.raises(TypeError, match=type(part).__name__):
        derive_seed("x", part)


def test_generators_of_the_same_words_draw_the_same():
    assert torch.equal(torch.rand(3, generator=generator("a", 1)), torch.rand(3, generator=generator("a", 1)))
    assert not torch.equal(
        torch.rand(3, generator=generator("a", 1)), torch.rand(3, generator=generator("a", 2))
    )


def test_forked_rng_repeats_and_puts_the_global_state_back_even_after_an_error():
    before = torch.random.get_rng_state()
    with forked_torch_rng(5):
        first = torch.rand(3)

    def fail():
        with forked_torch_rng(5, torch.device("cpu")):
            assert torch.equal(torch.rand(3), first)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.random.get_rng_state(), before)
    with forked_torch_rng(6):
        assert not torch.equal(torch.rand(3), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forked_rng_holds_on_cuda():
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    with forked_torch_rng(5, device):
        first = torch.rand(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with forked_torch_rng(5, device):
        assert torch.equal(torch.rand(3, device=device), first)
