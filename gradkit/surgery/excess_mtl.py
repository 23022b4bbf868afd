"""Weights that grow with each objective's distance from its optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradkit.core.arguments import check_count, check_number
from gradkit.core.gradients import Gradients
from gradkit.core.gram import accumulator, at_least_single, block_spans, block_width
from gradkit.surgery.inputs import Remembered, RuleInputs
from gradkit.surgery.vectors import VectorRule

# The authors' ε under the root; TorchJD also adds it to the first excess.
_EPSILON = 1e-7


@dataclass(eq=False)
class ExcessMTL(VectorRule):
    """Weight objectives by their excess risk (He et al., ICML 2024).

    From [Robust Multi-Task Learning with Excess
    Risks](https://proceedings.mlr.press/v235/he24n.html). The weights w on the simplex start equal:

        S_i ← S_i + g_i²                          elementwise; √S_i stands for the Hessian
        e_i = Σ_p g_ip² / √(S_ip + 1e-7)          an estimate of the excess risk
        w_i ← w_i·exp(η·e_i / (e_i(0) + 1e-7)) / Σ_j …
        d   = Σ_i w_i·g_i

    In the first `n_warmup_steps` steps weights do not change, and e(0) is the mean of e over them.
    The defaults are those of the authors' code, where e(0) is the first step's e and that step
    leaves the weights equal; only, its weights sum to K. With TorchJD's defaults, a step size of 1
    and no warm-up, the first weights are computed from e itself, which is about Σ_p |g_ip|: in
    realistic networks one objective then has all the weight from the first step on. (TorchJD reads
    the paper's Appendix C.1 as several warm-up steps, three epochs; not compared here.)

    Not homogeneous: e is in units of the gradients.

    Cost: none beyond the gradients. Memory: two flat vectors for each objective, the old and the
    new S. State: S, one flat vector for each objective; its weight, its first excess and its number
    of steps. An objective that appears later starts with the mean weight of the others, which it
    keeps during its own warm-up. S has the parameters' dtype: in pure bfloat16 training it soon
    stops growing.

    Args:
        robust_step_size: η, positive.
        n_warmup_steps: The number of steps over which the first excess is averaged; 0 in TorchJD.

    Raises:
        TypeError: If an argument is not a number, or `n_warmup_steps` not an integer.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> rule = gk.ExcessMTL(robust_step_size=1.0)
        >>> jacobian = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> rule(jacobian)
        tensor([1.0000, 0.5000])
        >>> rule(jacobian * torch.tensor([[1.0], [2.0]]))  # the second falls behind
        tensor([0.5064, 1.4936])
    """

    robust_step_size: float = 1e-2
    n_warmup_steps: int = 1

    degree = None
    remembers = "squares"

    def __post_init__(self) -> None:
        check_number("robust_step_size", self.robust_step_size, above=0)
        check_count("n_warmup_steps", self.n_warmup_steps, 0)

    def init(self, count: int) -> dict[str, Tensor]:
        zeros = torch.zeros(count, dtype=torch.float64)
        return {"logits": zeros, "first_excess": zeros, "steps": zeros}

    def renew(
        self,
        row: Float[Tensor, " P"],
        weight: Float[Tensor, ""],
        loss: Float[Tensor, ""],
        old: Float[Tensor, " P"] | None,
        out: Float[Tensor, " P"],
        memory: Mapping[str, Float[Tensor, ""]],
    ) -> Float[Tensor, ""]:
        """Add the squared gradient to S; returns the excess e."""
        wide = accumulator(row.device)
        excess = torch.zeros((), dtype=wide, device=row.device)
        dtype = at_least_single(row.dtype)
        weight = weight.to(dtype)
        for start, stop in block_spans(0, len(row), block_width(4, row.device)):
            squares = (row[start:stop].to(dtype) * weight).square_()
            total = squares if old is None else old[start:stop] + squares
            out[start:stop] = total
            root = total.add(_EPSILON).sqrt_()
            excess += squares.div_(root).sum(dtype=wide)
        return excess

    def respond(
        self,
        gradients: Gradients,
        active: list[int],
        renewed: Float[Tensor, "K P"],
        learned: Float[Tensor, " K"] | None,
        inputs: RuleInputs,
        memory: Remembered,
    ) -> tuple[Gradients, Remembered]:
        assert learned is not None  # the excess
        factors, learnt = self._weights(learned, memory)
        weights = torch.zeros_like(gradients.weights)
        weights[active] = gradients.weights[active] * factors.to(weights)
        return gradients.replace(weights=weights), learnt

    def _weights(
        self, excess: Float[Tensor, " K"], memory: Remembered
    ) -> tuple[Float[Tensor, " K"], Remembered]:
        steps, logits = memory["steps"], _with_newcomers(memory["logits"], memory["steps"] == 0)
        # Objectives that take no part in this step keep their share of the weight.
        share = logits.logsumexp(0)
        logits = logits - share
        first, counted = memory["first_excess"], max(self.n_warmup_steps, 1)
        first = torch.where(steps < counted, first + excess / counted, first)
        moves = steps >= self.n_warmup_steps
        # Without warm-up the first step's weights are computed from e itself.
        relative = torch.where(moves & (steps == 0), excess, excess / (first + _EPSILON))
        moved = _moved(logits, self.robust_step_size * relative, moves)
        learnt = {"logits": moved + share, "first_excess": first, "steps": steps + 1}
        return moved.softmax(0), learnt


def _with_newcomers(logits: Float[Tensor, " K"], new: Bool[Tensor, " K"]) -> Float[Tensor, " K"]:
    """The logarithms of the weights, where new objectives get the mean weight of the others."""
    others = logits.masked_fill(new, -math.inf).logsumexp(0) - (~new).sum().log()
    others = torch.where(new.all(), torch.zeros_like(others), others)
    return torch.where(new, others, logits)


def _moved(
    logits: Float[Tensor, " K"], by: Float[Tensor, " K"], moves: Bool[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """The logarithms of the weights after a step; weights that do not move yet are kept."""
    share = logits.masked_fill(~moves, -math.inf).logsumexp(0)
    stepped = (logits + by).masked_fill(~moves, -math.inf)
    return torch.where(moves, stepped.log_softmax(0) + share, logits)
