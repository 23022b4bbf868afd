"""Prompts that a cross-attention adds to a network's features: PASS's shape prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_count, own_generator
from gradkit.tta.adapter import own_copy
from gradkit.tta.features import classifier_of
from gradkit.tta.statistics import at_least_float32

Features = Float[Tensor, "batch channels height width"]


def attended(
    queries: Float[Tensor, "batch channels positions"],
    keys: Float[Tensor, "prompts positions"],
    values: Float[Tensor, "prompts positions"],
) -> Float[Tensor, "batch channels positions"]:
    """What each channel takes from the prompts.

        A = softmax over prompts(Q·Kᵀ/√L)     [C, L]; 0 but for the C/10 largest of each prompt
        A·V

    C/10 is rounded down, and at least 1. Attention is not normalised again.

    Examples:
        >>> queries = torch.tensor([[[0.0], [1.0]]])  # of two channels, at one position
        >>> keys, values = torch.tensor([[1.0], [0.0]]), torch.tensor([[10.0], [20.0]])
        >>> attended(queries, keys, values)  # the second takes the first prompt, and the reverse
        tensor([[[10.0000],
                 [ 6.6976]]])
    """
    attention = (queries @ keys.mT / math.sqrt(len(keys))).softmax(dim=2)
    most = attention.topk(max(1, attention.shape[1] // 10), dim=1).indices
    kept = torch.zeros_like(attention).scatter(1, most, 1.0)
    return attention * kept @ values


class ShapePrompts(nn.Module):
    """A bank of prompts, and the cross-attention that adds them to features; see `PASS`.

        Z ← Z + A(φ_q(Z), φ_k(P))·φ_v(P)     `attended`

    The bank P is [L, height, width], and 0 at first; φ are 3 × 3 depthwise convolutions. Features
    of another height and width get the bank resized, bilinearly.

    Args:
        channels: C, of the features.
        prompts: L.
        size: Height and width of the bank.
        like: A tensor with the precision and the device of the weights.
        generator: The generator of the convolutions' first weights, on the CPU; by default a new
            one with seed 0. They are uniform, as those of `torch.nn.Conv2d`.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is less than 1; in a call, if features have other channels.

    Examples:
        >>> prompts = ShapePrompts(channels=2, prompts=3, size=(4, 4))
        >>> prompts(torch.rand(1, 2, 4, 4)).shape, prompts(torch.rand(1, 2, 6, 5)).shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 2, 6, 5]))
    """

    def __init__(
        self,
        channels: int,
        prompts: int,
        size: tuple[int, int],
        like: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("prompts", prompts)
        like = torch.ones(()) if like is None else at_least_float32(like.detach())
        self.bank = nn.Parameter(like.new_zeros(prompts, *size))
        drawn = own_generator(generator)
        self.query, self.key, self.value = (
            drawn_convolution(count, count, 3, like, drawn, groups=count)
            for count in (channels, prompts, prompts)
        )

    def forward(self, features: Features) -> Features:
        """The features with what they take from the prompts."""
        if features.shape[1] != self.query.in_channels:
            raise ValueError(
                f"the prompted features have shape {list(features.shape)}, but the prompts are for "
                f"{self.query.in_channels} channels, as in the first pass; name a module whose "
                "output always has the same channels in prompted="
            )
        z, bank = features.to(self.bank), self.bank.unsqueeze(0)
        if z.shape[2:] != bank.shape[2:]:
            bank = F.interpolate(bank, size=z.shape[2:], mode="bilinear")
        key, value = self.key(bank).flatten(2)[0], self.value(bank).flatten(2)[0]
        change = attended(self.query(z).flatten(2), key, value)
        return features + change.view_as(z).to(features)


def drawn_convolution(
    inputs: int,
    outputs: int,
    side: int,
    like: Tensor,
    generator: torch.Generator,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution that keeps height and width, with torch's first weights from a generator.

    Weights and biases are uniform between ±1/√(inputs per group · side²).

    Args:
        inputs: Channels.
        outputs: Channels.
        side: Of the kernel; odd.
        like: A tensor with its precision and its device.
        generator: On the CPU.
        groups: See `torch.nn.Conv2d`.

    Examples:
        >>> drawn_convolution(3, 8, 1, torch.ones(()), torch.Generator())
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    layer = nn.Conv2d(
        inputs,
        outputs,
        side,
        padding=side // 2,
        groups=groups,
        device="meta",
        dtype=like.dtype,
    ).to_empty(device=like.device)
    bound = 1 / math.sqrt(inputs // groups * side**2)
    for parameter in layer.parameters():
        uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.copy_(bound * (2 * uniform - 1))
    return layer


def features_of(
    model: nn.Module, name: str, channels: int, image_size: int | Sequence[int]
) -> tuple[int, int, int]:
    """Channels, height and width of a module's output for an image of this size.

    A copy of the model is called with an image of zeros.

    Args:
        model: The model.
        name: Of the module.
        channels: Of the image.
        image_size: Height and width of the image; one number for both.

    Raises:
        TypeError: If the size is not one or two integers.
        ValueError: If the size is less than 1, if there is no such module, if the model does not
            take such an image or does not call the module, or if the output is no [N, C, H, W].

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 2, 1))
        >>> features_of(model, "0", 3, 65)
        (8, 32, 32)
    """
    size = [*image_size] if isinstance(image_size, Sequence) else [image_size] * 2
    if len(size) != 2:
        raise ValueError(f"image_size is {image_size}; pass height and width, or one for both")
    for each in size:
        check_count("image_size", each)
    model = own_copy(model).eval()
    module = classifier_of(model, name)
    found: list[Any] = []
    like = next(iter(model.parameters()), torch.ones(()))
    handle = module.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        with torch.no_grad():
            model(like.new_zeros(1, channels, *size))
    except Exception as error:
        raise ValueError(
            f"the model does not take images of shape {[1, channels, *size]} ({error}); pass "
            "image_size= the height and width of yours"
        ) from error
    finally:
        handle.remove()
    if not found:
        raise ValueError(_not_called(name))
    output = found[0]
    if not isinstance(output, Tensor) or output.dim() != 4:
        shown = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"prompted is {name!r}, whose output is not [N, C, H, W] but {shown}; name a module "
            "with one feature map, such as the encoder's last stage"
        )
    return output.shape[1], output.shape[2], output.shape[3]


@contextmanager
def added_to(module: nn.Module, name: str, prompts: ShapePrompts) -> Iterator[None]:
    """A context in which a module's output gets the prompts.

    Args:
        module: The module.
        name: Its name, for the error.
        prompts: The prompts.

    Raises:
        ValueError: If the module was not called.

    Examples:
        >>> layer = nn.Conv2d(3, 2, 1)
        >>> with added_to(layer, "0", ShapePrompts(2, 4, (8, 8))):
        ...     prompted = layer(torch.zeros(1, 3, 8, 8))
        >>> torch.equal(prompted, layer(torch.zeros(1, 3, 8, 8)))
        False
    """
    calls = 0

    def hook(module: nn.Module, inputs: Any, output: Features) -> Features:
        nonlocal calls
        calls += 1
        prompted: Tensor = prompts(output)
        return prompted

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise ValueError(_not_called(name))


def _not_called(name: str) -> str:
    return (
        f"the forward pass does not call prompted={name!r}; name a module that it calls, such as "
        "the encoder's last stage"
    )
