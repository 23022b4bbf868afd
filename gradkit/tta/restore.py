"""Ways back to the source's weights, for streams so long that adaptation may drift.

Each is passed to an adapter as `restore=`, which calls it after every applied step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gradkit.core.arguments import check_count, check_number, own_generator
from gradkit.tta.adapter import Adapter


class Pull:
    """Moves each trained weight a share of the way back: ROID's weight ensembling.

    ROID is by [Marsden et al., WACV 2024](https://arxiv.org/abs/2306.00650).

        φ ← (1 − share)·φ + share·φ_source

    It acts on what is trained, after the step; the optimizer's moments stay as they are, as in the
    authors' code. ROID's loss, its weights and its correction of the prior are not part of it.

    Args:
        share: The source's share, in [0, 1]. 0.01 is ROID's value.

    Raises:
        TypeError: If the share is no number.
        ValueError: If it is not between 0 and 1.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        >>> adapter = gk.tta.TENT(model, restore=gk.tta.Pull(1.0))  # no step is left
        >>> images = torch.rand(1, 3, 8, 8)
        >>> torch.equal(adapter(images), gk.tta.PTBN(model)(images))
        True
    """

    def __init__(self, share: int | float = 0.01) -> None:
        check_number("share", share, least=0, most=1)
        self.share = share

    def __call__(self, adapter: Adapter) -> None:
        """Move the weights."""
        source = adapter.source_weights()
        with torch.no_grad():
            for name, parameter in adapter.trained().items():
                parameter.lerp_(source[name], self.share)


class StochasticRestore:
    """Puts single weights back to the source's at random, as CoTTA does.

    CoTTA is by [Wang et al., CVPR 2022](https://arxiv.org/abs/2203.13591).

        φ_i ← φ_source,i with probability p, independently for each i

    State: the generator.

    Args:
        probability: p. 0.01 is CoTTA's value.
        generator: The generator of random numbers, on the CPU; by default a new one with seed 0.

    Attributes:
        facts: The share of weights that was "restored" in the last step.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the probability is not between 0 and 1, or the generator not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        >>> adapter = gk.tta.TENT(model, restore=gk.tta.StochasticRestore(0.5))
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self, probability: int | float = 0.01, generator: torch.Generator | None = None
    ) -> None:
        check_number("probability", probability, least=0, most=1)
        self.probability = probability
        self.generator = own_generator(generator)
        self.facts: dict[str, float] = {}

    def __call__(self, adapter: Adapter) -> None:
        """Restore the weights that are drawn."""
        source = adapter.source_weights()
        restored = 0
        with torch.no_grad():
            for name, parameter in adapter.trained().items():
                drawn = torch.rand(parameter.shape, generator=self.generator) < self.probability
                restored += int(drawn.sum())
                drawn = drawn.to(parameter.device)
                parameter.copy_(torch.where(drawn, source[name], parameter))
        count = sum(parameter.numel() for parameter in adapter.trained().values())
        self.facts = {"restored": restored / count}

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.generator.set_state(state_dict["generator"].cpu())


class PeriodicRestart:
    """Restarts from the source after every k-th step, as RDumb does.

    RDumb is by [Press et al., NeurIPS 2023](https://arxiv.org/abs/2306.05401). Weights, buffers,
    optimizer and teachers are reset. State: the number of steps.

    Args:
        k: The period; 1000 is RDumb's value. The prediction for the k-th batch is the restarted
            model's.

    Attributes:
        facts: Whether the last step "restarted".

    Raises:
        TypeError: If `k` is no integer.
        ValueError: If `k` is less than 1.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        >>> adapter = gk.tta.TENT(model, restore=gk.tta.PeriodicRestart(2))
        >>> images = torch.rand(1, 3, 8, 8)
        >>> first, second, third = (adapter(images) for _ in range(3))
        >>> torch.equal(first, third), torch.equal(second, gk.tta.PTBN(model)(images))
        (True, True)
    """

    def __init__(self, k: int = 1000) -> None:
        check_count("k", k)
        self.k, self.count = k, 0
        self.facts: dict[str, bool] = {}

    def __call__(self, adapter: Adapter) -> None:
        """Count, and restart when it is time."""
        self.count += 1
        restarts = self.count % self.k == 0
        self.facts = {"restarted": restarts}
        if restarts:
            adapter.restart()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.count = state_dict["count"]


class RestartBelow:
    """Restarts from the source when the running mean of a loss is too low: SAR's recovery.

    SAR is by [Niu et al., ICLR 2023](https://arxiv.org/abs/2302.12400).

        e ← 0.9·e + 0.1·loss, with the first loss at the start       loss: the last evaluation's
        if e < threshold: weights and optimizer back to the source, and e anew

    The objective gives the loss: it must keep its last value as `last`, as `ReliableEntropy` does.
    State: e.

    Args:
        threshold: Below which mean to restart; `math.inf` restarts after every step.
        objective: The name of the objective.
        decay: 0.9.
        relative: Whether the threshold is in units of the objective's own, its attribute `limit`.

    Attributes:
        facts: The running "mean_loss", and whether the last step "restarted".

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the threshold is NaN, or the decay not between 0 and 1; or, when the adapter
            is made, if it has no such objective.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        >>> adapter = gk.tta.SAR(model, restore=gk.tta.RestartBelow(float("inf")))
        >>> images = torch.rand(1, 3, 8, 8)
        >>> torch.equal(adapter(images), gk.tta.PTBN(model)(images))
        True
    """

    def __init__(
        self,
        threshold: int | float,
        objective: str = "loss",
        decay: int | float = 0.9,
        relative: bool = False,
    ) -> None:
        check_number("threshold", threshold, finite=False)
        check_number("decay", decay, least=0, most=1)
        self.threshold, self.objective, self.decay = threshold, objective, decay
        self.relative = relative
        self.mean: float | None = None
        self.facts: dict[str, Any] = {}

    def attach(self, adapter: Adapter) -> None:
        """Check that the adapter has the objective.

        Raises:
            ValueError: If it has not, or the objective does not keep its last value.
        """
        if not hasattr(adapter.objectives.get(self.objective), "last"):
            raise ValueError(
                f"RestartBelow watches the objective {self.objective!r}, which the adapter "
                "does not have or which keeps no attribute `last`; use gk.tta.ReliableEntropy"
            )

    def __call__(self, adapter: Adapter) -> None:
        """Follow the loss, and restart when its mean is too low."""
        watched: Any = adapter.objectives[self.objective]
        loss = float(watched.last)
        mean = loss if self.mean is None else self.decay * self.mean + (1 - self.decay) * loss
        restarts = mean < self.threshold * (watched.limit if self.relative else 1)
        self.facts = {"mean_loss": mean, "restarted": restarts}
        self.mean = None if restarts else mean
        if restarts:
            adapter.restart()

    def state_dict(self) -> dict[str, Any]:
        """The running mean; None before the first step and after a restart."""
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.mean = state_dict["mean"]
