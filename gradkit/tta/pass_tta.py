"""Prompts in images and features that align statistics with the source's; kept where certain."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradkit.core.arguments import check_count, check_number, own_generator
from gradkit.tta.adapter import Adapter
from gradkit.tta.features import captured_inputs
from gradkit.tta.lower_entropy import LowerEntropy
from gradkit.tta.objectives import Logits, Probabilities, Scalar, logits_of
from gradkit.tta.running import RunningStatistics, learning
from gradkit.tta.shape_prompts import ShapePrompts, added_to, drawn_convolution, features_of
from gradkit.tta.statistics import (
    PerChannel,
    Statistics,
    at_least_float32,
    norm_affine_parameters,
    require_running_statistics,
    unbiased_moments,
)

Images = Float[Tensor, "batch channels height width"]


class Decorated(nn.Module):
    """A model with PASS's prompts: images are changed pixel by pixel, and features by a bank.

        x ← x + W₂·relu(norm(W₁·x))       1 × 1 convolutions; norm: of each channel of each image
        Z ← Z + attention to the bank     the output of the module `prompted`; see `ShapePrompts`

    The model inside, called alone, has no prompts.

    Args:
        model: The model.
        channels: Of the images.
        hidden: Between the convolutions.
        generator: The generator of their first weights, on the CPU; by default a new one with
            seed 0. They are uniform, as those of `torch.nn.Conv2d`.
        prompted: The name of a module of the model; without one, features are not changed.
        prompts: How many, by default as many as the features have channels.
        image_size: Height and width of the images whose features have the bank's size.

    Examples:
        >>> model = Decorated(nn.Identity(), channels=1)
        >>> model(torch.rand(1, 1, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        channels: int = 3,
        hidden: int = 64,
        generator: torch.Generator | None = None,
        prompted: str | None = None,
        prompts: int | None = None,
        image_size: int | Sequence[int] = 512,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("hidden", hidden)
        self.model, self.prompted = model, prompted
        like = at_least_float32(next(iter(model.parameters()), torch.ones(())).detach())
        drawn = own_generator(generator)
        self.first = drawn_convolution(channels, hidden, 1, like, drawn)
        self.second = drawn_convolution(hidden, channels, 1, like, drawn)
        self.prompts: ShapePrompts | None = None
        if prompted is not None:
            count, *size = features_of(model, prompted, channels, image_size)
            prompts = count if prompts is None else prompts
            self.prompts = ShapePrompts(count, prompts, (size[0], size[1]), like, drawn)
        elif prompts is not None:
            raise ValueError(
                f"prompts is {prompts}, but prompted= names no module whose output gets them"
            )

    def decorate(self, images: Images) -> Images:
        """The images as the model gets them.

        Raises:
            ValueError: If they are not [N, C, H, W], or have another number of channels than
                `channels`.
        """
        if images.dim() != 4:
            raise ValueError(
                f"images have the shape {list(images.shape)}, but PASS's decorator is for images "
                "[N, C, H, W]"
            )
        if images.shape[1] != self.first.in_channels:
            raise ValueError(
                f"images have {images.shape[1]} channels, and PASS's decorator was made for "
                f"{self.first.in_channels}; pass channels={images.shape[1]}"
            )
        change: Tensor = self.second(
            F.instance_norm(self.first(images.to(self.first.weight))).relu()
        )
        return images + change.to(images)

    def forward(self, images: Images) -> Logits:
        """The model's logits of the decorated images, with prompted features."""
        with self._prompting():
            logits: Tensor = self.model(self.decorate(images))
        return logits

    def _prompting(self) -> AbstractContextManager[None]:
        if self.prompts is None:
            return nullcontext()
        assert self.prompted is not None
        return added_to(self.model.get_submodule(self.prompted), self.prompted, self.prompts)


class SourceAlignment:
    """The distance of the moments that normalisation layers read from the source's; see `PASS`.

        Σ over layers of mean|μ − μ_source| + 0.01·mean|v − v_source|      v unbiased

    Args:
        excluded: Names of modules whose layers are left out.
        variance_weight: 0.01.

    Raises:
        TypeError: If the weight is no number.
        ValueError: If it is negative; or, when the adapter is made, if no layer with running
            statistics is left.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Adapter(
        ...     model,
        ...     objectives={"loss": SourceAlignment()},
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ...     parameters=lambda model: model[0].parameters(),
        ... )
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(self, excluded: Sequence[str] = (), variance_weight: int | float = 0.01) -> None:
        check_number("variance_weight", variance_weight, least=0)
        self.excluded, self.variance_weight = tuple(excluded), variance_weight
        self.source: dict[str, tuple[PerChannel, PerChannel]] = {}

    def attach(self, adapter: Adapter) -> None:
        """Keep the source's statistics.

        Raises:
            ValueError: If there are none.
        """
        for name, layer in adapter.model.named_modules():
            if not isinstance(layer, _NormBase) or layer.running_mean is None:
                continue
            if not any(f".{each}." in f".{name}." for each in self.excluded):
                assert layer.running_var is not None
                self.source[name] = (layer.running_mean.clone(), layer.running_var.clone())
        if not self.source:
            raise ValueError(
                f"{type(adapter.model).__name__} has no BatchNorm with running statistics to align "
                f"with, apart from excluded={list(self.excluded)}"
            )

    def __call__(self, model: nn.Module, image: Tensor) -> Scalar:
        """The loss."""
        layers: dict[str, nn.Module] = dict(model.named_modules())
        with ExitStack() as stack:
            seen = {
                name: stack.enter_context(captured_inputs(layers[name])) for name in self.source
            }
            stack.enter_context(learning(model))
            logits = logits_of(model, image)
        gaps = [self._gap(name, x) for name, inputs in seen.items() for x in inputs]
        return torch.stack(gaps).sum() if gaps else 0 * logits.sum()

    def _gap(self, name: str, x: Tensor) -> Scalar:
        mean, var = unbiased_moments(name, x)
        source_mean, source_var = self.source[name]
        gap: Tensor = (mean - source_mean).abs().mean()
        return gap + self.variance_weight * (var - source_var).abs().mean()


class MomentumStart:
    """Lets each batch start from an average of the weights after earlier steps; see `PASS`.

    It is passed as `restore=`. The average θ̄ begins with the source's weights; after the t-th step

        θ̄ ← (1 − m_t)·θ̄ + m_t·θ,   m_t = 0.1·decay^t + least

    and before a batch θ ← θ̄, and buffers go back to the source's. State: θ̄ and t.

    Args:
        momentum: 0.1.
        decay: 0.94.
        least: The lower bound of m_t.

    Raises:
        TypeError: If a number is none.
        ValueError: If a number is not between 0 and 1, or if momentum and bound exceed 1 together.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.TENT(model, restore=MomentumStart(momentum=0, least=0))  # episodic
        >>> images = torch.rand(1, 3, 8, 8)
        >>> first = adapter(images)
        >>> adapter.facts["momentum"]
        0.0
    """

    def __init__(
        self,
        momentum: int | float = 0.1,
        decay: int | float = 0.94,
        least: int | float = 0.01,
    ) -> None:
        for name, value in (("momentum", momentum), ("decay", decay), ("least", least)):
            check_number(name, value, least=0, most=1)
        check_number("momentum + least", momentum + least, most=1)
        self.momentum, self.decay, self.least = momentum, decay, least
        self.t = 0
        self.mean: dict[str, Tensor] = {}
        self.facts: dict[str, float] = {}

    def attach(self, adapter: Adapter) -> None:
        """Start from the source's weights."""
        self.trained, self.buffers = adapter.trained(), dict(adapter.model.named_buffers())
        self.mean = {name: each.detach().clone() for name, each in self.trained.items()}
        self.source = {name: each.clone() for name, each in self.buffers.items()}

    def begin_batch(self, images: Tensor) -> None:
        """Go to the average."""
        for name, parameter in self.trained.items():
            parameter.copy_(self.mean[name])
        for name, buffer in self.buffers.items():
            buffer.copy_(self.source[name])

    def __call__(self, adapter: Adapter) -> None:
        """Move the average."""
        self.t += 1
        m = float(self.momentum * self.decay**self.t + self.least)
        self.facts = {"momentum": m}
        for name, parameter in self.trained.items():
            self.mean[name].lerp_(parameter.detach(), m)

    def state_dict(self) -> dict[str, Any]:
        """The average, and the number of steps."""
        return {"mean": self.mean, "t": self.t}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.mean, self.t = state_dict["mean"], state_dict["t"]


def _inner(model: nn.Module) -> nn.Module:
    assert isinstance(model, Decorated)
    return model.model


def _trained(model: nn.Module) -> Iterable[nn.Parameter]:
    assert isinstance(model, Decorated)
    prompts = () if model.prompts is None else model.prompts.parameters()
    decorator = [*model.first.parameters(), *model.second.parameters()]
    return [*norm_affine_parameters(model.model).values(), *decorator, *prompts]


def PASS(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 5e-3,
    statistics: str | Statistics | None = None,
    channels: int = 3,
    hidden: int = 64,
    excluded: Sequence[str] = (),
    class_weights: Sequence[int | float] | None = None,
    decay: int | float = 0.94,
    least: int | float = 0.01,
    probabilities: Probabilities = "auto",
    generator: torch.Generator | None = None,
    prompted: str | None = None,
    prompts: int | None = None,
    image_size: int | Sequence[int] = 512,
    **options: Any,
) -> Adapter:
    """PASS (IEEE TMI 2024): prompts for the style of images and for shapes in features.

    [PASS: Test-Time Prompting to Adapt Styles and Semantic Shapes in Medical Image
    Segmentation](https://arxiv.org/abs/2410.01573), as the authors' online program does it for disc
    and cup, with θ the scales and shifts of normalisation layers, a decorator of the image, and a
    bank of shape prompts with its cross-attention (`Decorated`):

        θ ← θ̄                                                    before each image
        L = Σ over layers of mean|μ − μ_source| + 0.01·mean|v − v_source|
        θ ← θ − Adam(∇L),   θ̄ ← (1 − m_t)·θ̄ + m_t·θ              twice; m_t = 0.1·0.94^t + 0.01
        predict x by θ, if its weighted entropy is below the source model's; else by that

    In the steps BatchNorm works as in training: it normalises by the image, and its running
    statistics move with a momentum of 0.1. The prediction takes these, so 0.81 parts of the
    source's; the next image starts from the source's again. Entropies are
    −Σ w_c·p·log p/Σ p; the authors weigh disc and cup by `class_weights=(5, 1)`.

    Shape prompts go to the output Z of one module, in the authors' network the encoder's last
    stage. Name yours in `prompted`; without a name there are none. They need no training on the
    source. The bank P has L maps of Z's height and width, as many as Z has channels (theirs 512),
    and begins at 0:

        Z ← Z + A·φ_v(P)      A = softmax over prompts(φ_q(Z)·φ_k(P)ᵀ/√L) [C, L]

    with depthwise 3 × 3 convolutions φ, and in each column of A all but the largest tenth set to 0.

    P and φ learn only from the alignment of layers behind `prompted`. The authors' program for disc
    and cup aligns the encoder alone (name the other modules in `excluded`): there no gradient
    reaches them, P stays 0, and each channel is shifted by a mixture of the random biases of φ_v.
    Their settings for the prostate name the decoder, too; here all layers are aligned by default,
    so that P and φ learn. Their online program for the prostate minimises an entropy instead, in
    one step; it is not offered. For images of another size than `image_size` the bank is resized,
    which theirs cannot do. Written from the authors' code, which was not run; the paper itself was
    not at hand.

    Cost: 4 forward passes and 2 backward passes per batch; one forward pass when it is made with
    `prompted`. State: θ̄, t, Adam's moments.

    Args:
        model: The source model; see `Adapter`. The adapter's model holds it as `model.model`.
        lr: Adam's learning rate.
        statistics: Where mean and variance come from; by default as above.
        channels: Of the images.
        hidden: The decorator's width.
        excluded: Names of modules whose layers are not aligned.
        class_weights: The weights of classes in the entropies; all 1 by default.
        decay: Of the momentum.
        least: The momentum's lower bound.
        probabilities: The meaning of the logits; see `TENT`.
        generator: The generator of the prompts' first weights, on the CPU; by default a new one
            with seed 0.
        prompted: The name of the module whose output [N, C, H, W] gets the shape prompts.
        prompts: L, how many; by default C.
        image_size: Height and width of the images, one number for both, from which the bank's size
            follows.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, if the model has no BatchNorm with running
            statistics, if it does not take images of `image_size`, or if it has no module of that
            name with such an output; in a call, if there are other numbers of weights than of
            classes, or images are not [N, C, H, W] or have other than `channels` channels.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.PASS(model, prompted="0", image_size=8)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.facts["adapted"].shape
        (torch.Size([1, 2, 8, 8]), torch.Size([1]))
        >>> adapter.model.prompts.bank.shape
        torch.Size([2, 8, 8])
    """
    require_running_statistics(model, "PASS")
    running = RunningStatistics(0.1)
    return Adapter(
        Decorated(model, channels, hidden, generator, prompted, prompts, image_size),
        statistics=running if statistics is None else statistics,
        objectives={"loss": SourceAlignment(excluded)},
        **{
            "optimizer": functools.partial(torch.optim.Adam, lr=lr),
            "parameters": _trained,
            "predict": LowerEntropy(class_weights, probabilities, _inner),
            "restore": MomentumStart(0.1, decay, least),
            "steps": 2,
            **options,
        },
    )
