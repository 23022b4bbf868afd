"""Weights that make all losses fall at the same rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import (
    Preference,
    Remembered,
    RuleInputs,
    Weighed,
    check_numbers,
    needed,
    too_low,
)
from gradkit.surgery.memory import known_objectives
from gradkit.weighting.adam import adam, adam_memory
from gradkit.weighting.loss_weighting import LossWeighting

# Added to each loss minus its minimum, as in the authors' code, so that 0 has a logarithm.
_EPS = 1e-8


@dataclass(eq=False)
class FAMO(LossWeighting):
    """Fast adaptive multitask optimization ([Liu et al., 2023](https://arxiv.org/abs/2306.03792)).

    As in the authors' code, with Dᵢ = Lᵢ − minᵢ + 1e-8 and ξ = 0 at first:

        z = softmax(ξ)
        step on ∇ Σ c·zᵢ·ln Dᵢ,        c = (Σ zᵢ/Dᵢ)⁻¹ held constant, so that wᵢ = c·zᵢ/Dᵢ
        δᵢ = ln Dᵢ(θ_t) − ln Dᵢ(θ_{t+1})
        ξ ← Adam(ξ, (∂z/∂ξ)ᵀδ, weight decay γ)

    An objective that falls less than the others gains weight. The weights sum to 1.

    The authors' code evaluates all losses on the same batch again after each step, at the cost of a
    forward pass. For their method, pass these losses to `update` after each step. Without it
    Dᵢ(θ_{t+1}) comes from the next step, which is the first to use the new ξ, at no cost. The two
    batches then differ: where losses vary more between batches than they fall in a step, δ is
    mostly noise, and z stays near its start. With the same batch in every step the two are equal.

    For an objective that has missed some steps, δ is its fall since the last step in which it took
    part. A new objective does not change ξ in its first step. The authors also clip gradients:
    `max_norm=1.0` in `wrap`.

    Losses multiplied by s multiply the direction by s, while the 1e-8 is negligible; the scale of a
    single loss changes only the direction's norm. Losses below `min_losses` give NaN.

    Cost: none beyond the gradients. State: for each objective ξ, Adam's moments and step count, and
    ln D of the last step.

    Args:
        lr: The learning rate of ξ.
        decay: γ, Adam's weight decay of ξ. The default is the paper's; the released code has
            several different defaults.
        min_losses: The lowest values losses can have: a number, a list with one for each
            objective, or a mapping from their names.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> weighting = gk.FAMO()
        >>> weighting(torch.tensor([1.0, 3.0]))  # proportional to 1/L
        tensor([0.7500, 0.2500])
        >>> weighting(torch.tensor([0.5, 3.0]))  # 6/7 and 1/7, but that the first has fallen
        tensor([0.8509, 0.1491])
    """

    lr: float = 0.025
    decay: float = 1e-3
    min_losses: float | Preference = 0.0

    def __post_init__(self) -> None:
        check_number("lr", self.lr, least=0)
        check_number("decay", self.decay, least=0)
        check_numbers("min_losses", self.min_losses)

    def init(self, count: int) -> dict[str, Tensor]:
        """ξ, Adam's memory, ln D of the last step, and whether there was a last step."""
        zeros = {key: torch.zeros(count, dtype=torch.float64) for key in ("xi", "logs", "seen")}
        return {**zeros, **adam_memory(count)}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        logs = self._logs(needed(inputs.first_losses, self), inputs)
        learnt = self._learnt(logs, memory)
        # zᵢ/Dᵢ, normalised, computed from logarithms: it neither overflows nor underflows.
        weights = (learnt["xi"] - self._logs(inputs.needed_losses(self), inputs)).softmax(0)
        return weights, {**learnt, "logs": logs, "seen": torch.ones_like(logs)}

    @torch.no_grad()
    def update(self, losses: Mapping[str, int | float | Float[Tensor, ""]]) -> None:
        """Update ξ by the losses after a step, on that step's batch, as the authors' code does.

        The next step then leaves ξ as it is. Losses of objectives that took no part in the last
        step change nothing, nor does a call after a step that was skipped. Where several ranks
        train together, pass losses that are averaged over them. Inside `gk.Every(k, ...)` a call
        after each step learns from every k-th only.

        Args:
            losses: The losses by the objectives' names.

        Raises:
            ValueError: If there has been no step with one of the objectives, or if a loss is not
                finite or not above its minimum; nothing is changed then.

        Examples:
            >>> import torch, gradkit as gk
            >>> w, famo = torch.nn.Parameter(torch.ones(2)), gk.FAMO()
            >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), famo)
            >>> def losses():
            ...     return {"a": w[0] ** 2, "b": w[1] ** 2 + 3}
            >>> _ = optimizer.step(losses)
            >>> with torch.no_grad():
            ...     famo.update(losses())
            >>> famo.state["xi"]  # the first has fallen more
            tensor([-0.0250,  0.0250], dtype=torch.float64)
        """
        known = known_objectives(self.state)
        for name in losses:
            if name not in known:
                raise ValueError(
                    f"there has been no step with the objective {name!r}; call update() after a "
                    "step, with losses by the objectives' names"
                )
        numbers = {name: float(loss) for name, loss in losses.items()}
        wrong = self.objection(numbers) or next(
            (
                f"the loss of {name!r} is {loss}"
                for name, loss in numbers.items()
                if loss == math.inf
            ),
            None,
        )
        if wrong is not None:
            raise ValueError(f"{wrong}; nothing was changed")
        values = torch.tensor([*numbers.values()], dtype=torch.float64, device="cpu")
        memory = self.recall(tuple(losses), values, (), self.state)
        inputs = RuleInputs(values.new_zeros(len(values), len(values)), tuple(losses))
        learnt = self._learnt(self._logs(values, inputs), memory.of_present())
        self.state.update(memory.with_present({**learnt, "seen": torch.zeros_like(values)}))

    def _learnt(
        self, logs: Float[Tensor, " K"], memory: Remembered
    ) -> dict[str, Float[Tensor, " K"]]:
        """ξ and Adam's memory after a step of Adam, for objectives whose last ln D is known."""
        known, xi = memory["seen"] > 0, memory["xi"]
        z = xi.masked_fill(~known, -torch.inf).softmax(0)
        falls = torch.where(known, memory["logs"] - logs, torch.zeros_like(logs))
        gradient = z * (falls - (z * falls).sum())
        new_xi, remembered = adam(xi, gradient, memory, self.lr, self.decay)
        remembered["xi"] = new_xi
        return {key: torch.where(known, new, memory[key]) for key, new in remembered.items()}

    def objection(self, losses: Mapping[str, float]) -> str | None:
        lowest = self.min_losses
        if isinstance(lowest, (int, float)):
            least = dict.fromkeys(losses, float(lowest))
        elif isinstance(lowest, Mapping):
            least = {name: lowest.get(name, -math.inf) for name in losses}
        elif len(lowest) == len(losses):
            least = dict(zip(losses, map(float, lowest), strict=True))
        else:  # observers have losses, too
            return None
        least = {name: number - _EPS for name, number in least.items()}
        return too_low(self, losses, least, "no losses below min_losses")

    def _logs(self, losses: Float[Tensor, " K"], inputs: RuleInputs) -> Float[Tensor, " K"]:
        return (losses - inputs.numbers(self.min_losses, losses) + _EPS).log()
