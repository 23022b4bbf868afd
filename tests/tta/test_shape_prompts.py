"""The cross-attention to a bank of prompts, and where it is put into a network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkit as gk
from gradkit.tta.shape_prompts import ShapePrompts, added_to, attended, features_of
from tta.references import images, network


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("channels", "kept"), [(4, 1), (19, 1), (25, 2), (40, 4)])
def test_each_prompt_goes_to_the_channels_that_attend_to_it_most(channels, kept) -> None:
    queries, keys, values = double(2, channels, 6), double(5, 6, seed=1), double(5, 6, seed=2)
    found = attended(queries, keys, values)
    for image in range(2):
        attention = torch.zeros(channels, 5, dtype=torch.float64)
        for c in range(channels):
            terms = [float(queries[image, c] @ key) / 5**0.5 for key in keys]
            total = sum(torch.tensor(term).double().exp() for term in terms)
            for prompt, term in enumerate(terms):
                attention[c, prompt] = torch.tensor(term).double().exp() / total
        for prompt in range(5):
            least = sorted(attention[:, prompt].tolist())[-kept]
            attention[attention[:, prompt] < least, prompt] = 0
        assert (attention > 0).sum(dim=0).tolist() == 5 * [kept]
        for c in range(channels):
            expected = sum(attention[c, prompt] * values[prompt] for prompt in range(5))
            torch.testing.assert_close(found[image, c], expected, rtol=1e-6, atol=1e-7)


def test_a_bank_of_zeros_adds_a_constant_to_each_channel() -> None:
    prompts = ShapePrompts(4, 3, (5, 6), double(1))
    z = double(2, 4, 5, 6)
    change = prompts(z).detach() - z
    torch.testing.assert_close(change, change[:, :, :1, :1].expand_as(z), rtol=0, atol=1e-12)
    assert change.abs().amax() > 1e-3
    # Each prompt goes to one channel, whose attention to it is at most 1.
    assert float(change[0, :, 0, 0].abs().sum()) <= float(prompts.value.bias.detach().abs().sum())


def test_features_of_another_size_get_the_bank_resized() -> None:
    prompts = ShapePrompts(4, 3, (4, 4), double(1))
    with torch.no_grad():
        prompts.bank.copy_(double(3, 4, 4, seed=3))
    z = double(1, 4, 6, 10)
    twin = ShapePrompts(4, 3, (6, 10), double(1))
    state = prompts.state_dict()
    state["bank"] = F.interpolate(state["bank"][None], (6, 10), mode="bilinear")[0]
    twin.load_state_dict(state)
    assert torch.equal(prompts(z), twin(z))
    assert not torch.equal(prompts(z), z)


def test_they_are_drawn_as_torchs_layers_are() -> None:
    state = torch.get_rng_state()
    first, second = (ShapePrompts(64, 32, (2, 2)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.bank.any()
    for name in ("query", "key", "value"):
        layer = getattr(first, name)
        assert torch.equal(layer.weight, getattr(second, name).weight)
        for drawn in (layer.weight, layer.bias):  # torch.nn.Conv2d: 1/√9
            assert 0.9 / 3 < drawn.abs().max() <= 1 / 3
    assert not torch.equal(first.key.weight, first.value.weight)
    other = ShapePrompts(64, 32, (2, 2), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.query.weight, other.query.weight)
    assert ShapePrompts(2, 3, (2, 2), torch.ones((), dtype=torch.float16)).bank.dtype == (
        torch.float32
    )


def test_half_precision_and_images_of_a_batch_by_themselves() -> None:
    prompts = ShapePrompts(4, 3, (5, 6))
    z = double(2, 4, 5, 6).float()
    torch.testing.assert_close(prompts(z)[1:], prompts(z[1:]), rtol=1e-6, atol=1e-7)
    half = prompts(z.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), prompts(z), rtol=1e-2, atol=1e-2)


def test_they_act_within_the_context_alone() -> None:
    model, prompts = network().eval(), ShapePrompts(4, 3, (12, 16), double(1))
    x = images(1)[0]
    before = model(x)
    with added_to(model[2], "2", prompts):
        prompted = model(x)
    expected = model[3:](prompts(model[:3](x)))
    torch.testing.assert_close(prompted, expected, rtol=1e-12, atol=0)
    assert torch.equal(model(x), before)
    assert not torch.equal(prompted, before)
    with pytest.raises(ZeroDivisionError), added_to(model[2], "2", prompts):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)


def test_features_are_measured_on_a_copy() -> None:
    model = network().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert features_of(model, "2", 3, (9, 7)) == (4, 9, 7)
    assert features_of(model, "7", 3, 5) == (2, 5, 5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[1].training
    assert not model[2]._forward_hooks


class Forked(nn.Module):
    """Two feature maps, and a head that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.fork = nn.Conv2d(3, 4, 1), Fork()
        self.norm, self.head, self.idle = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a, b = self.fork(self.encoder(x))
        return self.head(self.norm(a + b))


class Fork(nn.Module):
    def forward(self, x):
        return x, 2 * x


def test_bad_modules_and_sizes() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2))
    for model, arguments, message in (
        (Forked(), {"prompted": "fork", "image_size": 8}, "'fork', whose output is .* but tuple"),
        (Forked(), {"prompted": "idle", "image_size": 8}, "does not call prompted='idle'"),
        (flat, {"prompted": "2", "image_size": 8}, r"'2', whose output is .* but \[1, 256\]"),
        (flat, {"prompted": "0"}, r"does not take images of shape \[1, 3, 512, 512\].*image_size="),
        (flat, {"prompted": "0", "image_size": (8, 0)}, "image_size is 0"),
        (flat, {"prompted": "0", "image_size": (8, 8, 8)}, r"image_size is \(8, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.PASS(model, **arguments)


class Widening(nn.Module):
    """Has as many channels as the image has rows, and may leave out its features."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm, self.head = nn.Identity(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        self.skips = False

    def forward(self, x):
        z = x.transpose(1, 2)
        z = z if self.skips else self.features(z)
        return self.head(self.norm(z.transpose(1, 2)))


def test_a_model_that_changes_is_told_of_and_nothing_is_lost() -> None:
    adapter = gk.tta.PASS(Widening(), prompted="features", image_size=8)
    adapter(torch.rand(1, 3, 8, 8))
    before = gk.testing.bits(adapter.state_dict())
    with pytest.raises(ValueError, match=r"shape \[1, 9, 3, 8\], but the prompts are for 8 chan"):
        adapter(torch.rand(1, 3, 9, 8))
    adapter.model.model.skips = True
    with pytest.raises(ValueError, match="does not call prompted='features'"):
        adapter(torch.rand(1, 3, 8, 8))
    assert gk.testing.bits(adapter.state_dict()) == before


def test_the_source_prediction_has_no_prompts() -> None:
    model, x = network().eval(), images(1)[0]
    adapter = gk.tta.PASS(
        model, hidden=4, prompted="2", image_size=(12, 16), class_weights=(0, 0)
    )  # so that entropies are equal, and the source's prediction is taken
    assert torch.equal(adapter(x), model(x))
    assert not torch.equal(adapter.model(x), adapter.model.model(x))
