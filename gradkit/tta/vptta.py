"""A prompt in the frequencies of each image, for a frozen network."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_count, check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.objectives import Logits, Scalar, logits_of
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    CountingStatistics,
    PerChannel,
    at_least_float32,
    require_running_statistics,
    source_moments,
    unbiased_moments,
)

Images = Float[Tensor, "batch channels height width"]


class Prompted(nn.Module):
    """A model whose images are multiplied by a prompt in the lowest frequencies.

    Amplitudes of the images' Fourier transform are multiplied by the prompt, phases are kept.

    Args:
        model: The model.
        channels: Of the images.
        size: The side of the prompt.

    Examples:
        >>> model = Prompted(nn.Identity(), channels=1, size=1)
        >>> with torch.no_grad():
        ...     _ = model.prompt.fill_(2.0)  # of the mean
        >>> model(torch.tensor([[[[0.0, 1.0, 2.0]]]])).detach().round(decimals=4)
        tensor([[[[1., 2., 3.]]]])
    """

    def __init__(self, model: nn.Module, channels: int = 3, size: int = 5) -> None:
        super().__init__()
        self.model = model
        like = at_least_float32(next(iter(model.parameters()), torch.ones(())).detach())
        self.prompt = nn.Parameter(like.new_ones(channels, size, size))

    def forward(self, images: Images) -> Logits:
        """The model's logits of the prompted images."""
        spectrum = torch.fft.fft2(at_least_float32(images))
        amplitude = torch.fft.fftshift(spectrum.abs(), dim=(-2, -1))
        factor = torch.ones_like(amplitude[0])
        rows, columns = self._low(images)
        factor = factor.index_put(
            (torch.arange(len(factor), device=rows.device)[:, None, None], rows[:, None], columns),
            self.prompt.to(factor.dtype),
        )
        amplitude = torch.fft.ifftshift(amplitude * factor, dim=(-2, -1))
        prompted = torch.fft.ifft2(torch.polar(amplitude, spectrum.angle())).real
        logits: Tensor = self.model(prompted.to(images.dtype))
        return logits

    def low_frequencies(self, images: Images) -> Float[Tensor, "batch channels size size"]:
        """The amplitudes that the prompt multiplies, of the images themselves."""
        amplitude = torch.fft.fftshift(torch.fft.fft2(at_least_float32(images)).abs(), dim=(-2, -1))
        rows, columns = self._low(images)
        low: Tensor = amplitude[..., rows[:, None], columns]
        return low

    def _low(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size = self.prompt.shape[-1]
        height, width = ((side - size) // 2 for side in images.shape[-2:])
        span = torch.arange(size, device=images.device)
        return height + span, width + span


class WarmUp(CountingStatistics):
    """Statistics that rely less and less on the image; see `VPTTA`.

        m_k = 1/(√k/n + 1)                       k = 1, 2, …, one per batch
        μ = m_k·μ_test + (1 − m_k)·μ_source,     v likewise, unbiased; both are constants

    State: k.

    Args:
        n: How slowly.

    Attributes:
        facts: The "momentum" m_k of the last batch.
        gaps: While it is a list, each layer appends how far its input's statistics are from these.

    Raises:
        TypeError: If `n` is no number.
        ValueError: If it is not positive.

    Examples:
        >>> statistics = WarmUp()
        >>> [round(statistics.momentum_of(k), 4) for k in (1, 4, 25)]
        [0.8333, 0.7143, 0.5]
    """

    uses_source: ClassVar[bool] = True

    def __init__(self, n: int | float = 5) -> None:
        check_number("n", n, above=0)
        self.n = n
        self.facts: dict[str, float] = {}
        self.gaps: list[Tensor] | None = None

    def __repr__(self) -> str:
        return f"WarmUp(n={self.n})"

    def momentum_of(self, k: int) -> float:
        """m_k, the test's share at the k-th batch."""
        return 1 / (math.sqrt(k) / self.n + 1)

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The mixture, without a gradient."""
        mean, var = unbiased_moments(layer.name, x.detach())
        values = at_least_float32(x).flatten(2)
        m = self.momentum_of(self.k)
        source_mean, source_var = source_moments(layer)
        mean = m * mean + (1 - m) * source_mean
        var = m * var + (1 - m) * source_var
        if self.gaps is not None:
            # Unlike a square root, std has a gradient (0) where a channel is constant.
            own_std, own_mean = torch.std_mean(values, dim=2, correction=1)
            gap = (mean - own_mean).abs().mean() + (var.sqrt() - own_std).abs().mean()
            self.gaps.append(gap)
        return mean, var

    def observe(self, model: nn.Module, images: Tensor) -> None:
        """Count the batch."""
        self.k += 1
        self.facts = {"momentum": self.momentum_of(self.k)}


class _Alignment:
    """The mean over layers of the distance between the image's statistics and the mixture."""

    def attach(self, adapter: Adapter) -> None:
        self.statistics: Any = adapter.statistics

    def __call__(self, model: Any, image: Images) -> Scalar:
        gaps = self.statistics.gaps = []
        try:
            logits_of(model, image)
        finally:
            self.statistics.gaps = None
        return torch.stack(gaps).mean()


class _PromptMemory:
    """Starts each prompt from those of similar images, and remembers it after the prediction."""

    def __init__(self, size: int, neighbours: int) -> None:
        self.size, self.neighbours = size, neighbours
        self.facts: dict[str, bool] = {}
        self.keys: Float[Tensor, "entries length"] | None = None
        self.prompts: Float[Tensor, "entries channels size size"] | None = None

    def check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or len(images) != 1:
            raise ValueError(
                f"images have shape {list(images.shape)}, but a prompt is one image's: pass images "
                "[1, channels, H, W] one by one"
            )
        channels, size = self.prompted.prompt.shape[:2]
        if images.shape[1] != channels:
            raise ValueError(
                f"images have shape {list(images.shape)}, but the prompt has {channels} channels: "
                f"pass channels={images.shape[1]}"
            )
        if min(images.shape[2:]) < size:
            raise ValueError(
                f"images have shape {list(images.shape)}, but the prompt has a side of {size} "
                "pixels: pass larger images, or a smaller prompt_size="
            )

    def attach(self, adapter: Adapter) -> None:
        self.prompted: Any = adapter.model

    def begin_batch(self, images: Tensor) -> None:
        start = torch.ones_like(self.prompted.prompt)
        remembers = self.keys is not None and len(self.keys) >= self.neighbours
        self.facts = {"from_memory": remembers}
        if remembers:
            assert self.keys is not None
            assert self.prompts is not None
            key = self.prompted.low_frequencies(images).flatten(1)
            similar, nearest = torch.cosine_similarity(self.keys, key).topk(self.neighbours)
            weights = (similar / 0.2).softmax(dim=0).to(start.dtype)
            start = torch.tensordot(weights, self.prompts[nearest], dims=1)
        self.prompted.prompt.copy_(start)

    def __call__(self, model: nn.Module, images: Tensor) -> Logits:
        logits = logits_of(model, images)
        key = self.prompted.low_frequencies(images).flatten(1)
        prompt = self.prompted.prompt.detach().clone().unsqueeze(0)
        if not (key.isfinite().all() and prompt.isfinite().all()):
            return logits  # later prompts would start from it
        if self.keys is not None and self.prompts is not None:
            key, prompt = torch.cat([self.keys, key]), torch.cat([self.prompts, prompt])
        self.keys, self.prompts = key[-self.size :].clone(), prompt[-self.size :].clone()
        return logits

    def state_dict(self) -> dict[str, Any]:
        return {"keys": self.keys, "prompts": self.prompts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.keys, self.prompts = state_dict["keys"], state_dict["prompts"]


def _prompt(model: nn.Module) -> Iterable[nn.Parameter]:
    assert isinstance(model, Prompted)
    return [model.prompt]


def VPTTA(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 0.05,
    channels: int = 3,
    prompt_size: int = 5,
    memory: int = 40,
    neighbours: int = 16,
    warm_up: int | float = 5,
    **options: Any,
) -> Adapter:
    """Visual-prompt-based test-time adaptation (VPTTA, CVPR 2024).

    [Each Test Image Deserves A Specific Prompt: Continual Test-Time Adaptation for 2D Medical Image
    Segmentation](https://arxiv.org/abs/2311.18363). The network is frozen. Each image x gets a
    prompt P [channels, 5, 5], by which the amplitudes of its lowest frequencies are multiplied:

        P  = 1, or the mean of the prompts of the 16 most similar of the last 40 images, weighted by
             softmax(cosine of low amplitudes / 0.2)
        m_k = 1/(√k/5 + 1)                                    for the k-th image
        μ, v = m_k·(of the image) + (1 − m_k)·(source's)      in each BatchNorm; constants
        L  = mean over layers of mean|μ − μ_image| + mean|√v − σ_image|
        P  ← P − Adam(∇_P L)                                  lr 0.05, β = (0.9, 0.99)
        predict prompted x; remember low amplitudes and P

    Adam's moments go on from image to image, as in the authors' code. Their prompt has 1% of the
    image's side, 5 of 512; their memory in fact keeps 41. Images come one at a time.

    Cost: 2 forward passes and 1 backward pass per image. State: k, Adam's moments, the memory.

    Args:
        model: The source model; see `Adapter`. The adapter's model holds it as `model.model`.
        lr: Adam's learning rate.
        channels: Of the images.
        prompt_size: The side of the prompt.
        memory: How many images are remembered.
        neighbours: How many of them a prompt starts from.
        warm_up: n of m_k.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, or if the model has no BatchNorm with running
            statistics; in a call, if there is more than one image, or the prompt does not fit it.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.VPTTA(model)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, list(adapter.trained())
        (torch.Size([1, 2, 8, 8]), ['prompt'])
    """
    for name, value in (
        ("channels", channels),
        ("prompt_size", prompt_size),
        ("memory", memory),
        ("neighbours", neighbours),
    ):
        check_count(name, value)
    check_number("neighbours", neighbours, most=memory)
    require_running_statistics(model, "VPTTA")
    return Adapter(
        Prompted(model, channels, prompt_size),
        statistics=WarmUp(warm_up),
        objectives={"loss": _Alignment()},
        **{
            "optimizer": functools.partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.99)),
            "parameters": _prompt,
            "predict": _PromptMemory(memory, neighbours),
            **options,
        },
    )
