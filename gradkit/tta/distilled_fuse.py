"""The fusion of candidates, from which the model goes on learning."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.core.arguments import own_generator
from gradkit.tta.adapter import Adapter
from gradkit.tta.augment import StrongAugmentation, minmax
from gradkit.tta.distributions import cross_entropies, log_distributions
from gradkit.tta.fuse import Alternatives, Fusion
from gradkit.tta.objectives import Augmentation, Image, Logits, Model, Scalar, logits_of
from gradkit.tta.restore import Pull
from gradkit.tta.statistics import Mixed, Statistics


class FusedTarget:
    """Cross-entropy of a strong view with the fusion of the source model; see `DistilledFuse`.

    The adapter's statistics must be `Alternatives`. State: the generator.

    Args:
        fusion: How the source model's candidates are fused; by default all alike.
        augmentation: `(images, generator) -> images`, of the same shape; by default
            `StrongAugmentation()`.
        generator: The generator of the strong views, on the CPU; by default a new one with seed 0.

    Attributes:
        target: The fused logits of the last batch.

    Raises:
        TypeError: If the generator is none.
        ValueError: If it is not on the CPU; or, when the adapter is made, if its statistics are not
            alternatives; or, in a call, if the images do not fit the views or the augmentation.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Adapter(
        ...     model,
        ...     statistics=gk.tta.Alternatives("source", "test"),
        ...     objectives={"loss": FusedTarget()},
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ... )
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self,
        fusion: Fusion | None = None,
        augmentation: Augmentation | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.fusion = Fusion() if fusion is None else fusion
        self.augmentation = StrongAugmentation() if augmentation is None else augmentation
        self.generator = own_generator(generator)
        self.adapter: Adapter | None = None
        self.target: Logits | None = None
        self.strong: Tensor | None = None

    def attach(self, adapter: Adapter) -> None:
        """Take the adapter, which has the model, its weights at the start, and the statistics.

        Raises:
            ValueError: If there are no alternatives among the statistics.
        """
        self.fusion.attach(adapter)
        self.adapter = adapter

    def check_images(self, images: Tensor) -> None:
        """Check that views and augmentation can be applied to these images.

        Raises:
            ValueError: If they cannot.
        """
        self.fusion.check_images(images)
        check = getattr(self.augmentation, "check_images", None)
        if check is not None:
            check(images)

    def begin_batch(self, images: Tensor) -> None:
        """Fuse the candidates of the source model."""
        assert self.adapter is not None
        model, weights = self.adapter.model, self.adapter.source_weights()

        def source(x: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(model, weights, (x,))
            return logits

        self.target = self.fusion(source, images)

    def begin_step(self, images: Tensor) -> None:
        """Draw the strong view, which is the same at displaced weights."""
        self.strong = minmax(self.augmentation(images, self.generator))

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss, averaged over the candidates' statistics."""
        assert self.target is not None
        assert self.strong is not None
        statistics, probabilities = self.fusion.statistics, self.fusion.probabilities
        target = log_distributions(self.target, probabilities).exp()
        losses = []
        try:
            for index in range(len(statistics.choices)):
                statistics.index = index
                log_p = log_distributions(logits_of(model, self.strong), probabilities)
                losses.append(cross_entropies(target, log_p).mean())
        finally:
            statistics.index = 0
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.generator.set_state(state_dict["generator"].cpu())


def DistilledFuse(  # noqa: N802 # named like the methods
    model: nn.Module,
    fusion: Fusion | None = None,
    statistics: Sequence[str | Statistics] = ("source", Mixed(0.2)),
    lr: float = 3e-3,
    augmentation: Augmentation | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Adapter:
    """`Fuse`, with a student that learns from the fusion of the frozen source model.

        q  = the fusion of the source model's candidates for x            a constant
        L  = mean over r of CE(p_r(strong(x); φ), q)                      r: the statistics
        φ  ← φ − Adam(∇L)
        φ  ← 0.99·φ + 0.01·φ_source
        predict by the fusion of the candidates of φ

    This is no published method. The target never moves, so that errors do not feed on themselves,
    and the pull keeps φ near the source. `examples/fundus` and `docs/composition.md` have what it
    gave on fundus photographs.

    Cost: 26 forward passes and 2 backward passes per batch. State: φ, Adam's moments, the
    generator.

    Args:
        model: The source model; see `Adapter`.
        fusion: The weights or the gate, the views, and the meaning of the logits; by default all
            candidates alike. The target and the prediction are fused alike.
        statistics: Of each candidate.
        lr: Adam's learning rate.
        augmentation: The strong view; see `FusedTarget`.
        generator: The generator of the strong views, on the CPU; by default a new one with seed 0.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, or if the statistics do not fit the model; in
            a call, if the images do not fit the views or the augmentation, or the numbers of
            weights those of candidates and classes.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> fusion = gk.tta.Fusion(weights=((0.0, 0.6), (1.0, 0.4)))  # disc and cup
        >>> adapter = gk.tta.DistilledFuse(model, fusion)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.last_step.applied
        (torch.Size([1, 2, 8, 8]), True)
    """
    fusion = Fusion() if fusion is None else fusion
    return Adapter(
        model,
        statistics=Alternatives.of_candidates(statistics),
        objectives={"loss": FusedTarget(fusion, augmentation, generator)},
        **{
            "optimizer": functools.partial(torch.optim.Adam, lr=lr),
            "predict": fusion,
            "restore": Pull(0.01),
            **options,
        },
    )
