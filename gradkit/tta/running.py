"""Running statistics that move with the test images, as BatchNorm's do in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from gradkit.core.arguments import check_number
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    PerChannel,
    SourceStatistics,
    Statistics,
    batch_moments,
    source_moments,
    statistics_of,
    unbiased_moments,
)


class RunningStatistics(Statistics):
    """The model's running statistics, moved by passes that learn; see `learning`.

        moved = (1 − momentum)·running + momentum·batch          stored

    A pass that learns normalises by the batch, as BatchNorm does in training, or by what it has
    stored. All other passes normalise by the running statistics. As in BatchNorm, gradients flow
    through the batch's moments, and what is stored comes from the first evaluation in a step.

    The running statistics are the model's buffers. A teacher is a copy of the model, so it has
    buffers of its own; with `gk.EMA(..., buffers="skip")` they do not follow the student's. In an
    InstanceNorm with running statistics each image is a batch, and the first of them moves.

    Args:
        momentum: The batch's share.
        uses_moved: Whether a pass that learns normalises by what it has stored, as in RoTTA; the
            batch's variance is then biased. Otherwise it normalises by the batch, whose unbiased
            variance is stored, as BatchNorm does.

    Raises:
        TypeError: If the momentum is no number.
        ValueError: If it is not between 0 and 1.

    Examples:
        >>> import torch
        >>> from gradkit.tta import install_statistics
        >>> layer = install_statistics(nn.BatchNorm1d(1), RunningStatistics(0.5, uses_moved=True))
        >>> with learning(layer):
        ...     _ = layer(torch.tensor([[10.0], [20.0]]))
        >>> layer.running_mean, layer.running_var  # from 0 and 1 towards 15 and 25
        (tensor([7.5000]), tensor([13.]))
    """

    uses_source: ClassVar[bool] = True

    def __init__(self, momentum: int | float = 0.1, uses_moved: bool = False) -> None:
        check_number("momentum", momentum, least=0, most=1)
        self.momentum, self.uses_moved = momentum, uses_moved
        # Of a pass that learns: the layers that have not moved yet.
        self._waiting: set[str] | None = None

    def __repr__(self) -> str:
        return f"RunningStatistics(momentum={self.momentum}, uses_moved={self.uses_moved})"

    @property
    def learns(self) -> bool:
        """True; what they have learnt is in the model's buffers."""
        return True

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The running statistics; in a pass that learns, those of `x` or the moved ones."""
        running = source_moments(layer)
        if self._waiting is None:
            return running
        batch = batch_moments(x)
        if layer.name not in self._waiting:
            return running if self.uses_moved else batch
        towards = batch if self.uses_moved else unbiased_moments(layer.name, x)
        mean, var = (
            (1 - self.momentum) * here + self.momentum * there
            for here, there in zip(running, towards, strict=True)
        )
        layer.keep(mean, var)
        self._waiting.discard(layer.name)
        return (mean, var) if self.uses_moved else batch

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """By `moments`; where nothing is learnt, BatchNorm in evaluation mode."""
        if self._waiting is None:
            return SourceStatistics().normalise(layer, x)
        return super().normalise(layer, x)


@contextmanager
def learning(model: nn.Module) -> Iterator[set[str]]:
    """A context in which the `RunningStatistics` of a model learn; others do not change.

    Each layer moves once, in its first call.

    Yields:
        The names of the layers that have not moved yet.

    Examples:
        >>> import torch
        >>> from gradkit.tta import install_statistics
        >>> model = install_statistics(nn.Sequential(nn.BatchNorm1d(2)), RunningStatistics())
        >>> with learning(model) as waiting:
        ...     print(waiting)
        ...     _ = model(torch.rand(4, 2))
        ...     print(waiting)
        {'0'}
        set()
    """
    found: dict[int, RunningStatistics] = {}
    waiting: set[str] = set()
    for layer in model.modules():
        statistics = statistics_of(layer)
        if isinstance(statistics, RunningStatistics):
            found[id(statistics)] = statistics
            waiting.add(_name(layer))
    before = {key: each._waiting for key, each in found.items()}
    try:
        for each in found.values():
            each._waiting = waiting
        yield waiting
    finally:
        for key, each in found.items():
            each._waiting = before[key]


def _name(layer: Any) -> str:
    """The name that the layer's calls have."""
    name: str = layer.name if isinstance(layer, AdaptedBatchNorm) else layer._adaptation.name
    return name
