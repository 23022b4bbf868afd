"""What an optimizer remembers of its last step."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What happened in a step, as tensors that the host reads only when asked.

    Attributes:
        names: The K objectives.
        losses: Each one's loss at its first evaluation in the step [K].
        gram: The Gram matrix of the gradients that were applied [K, K].
        weights: Their weights in the direction [K].
        lr_scale: What the learning rate was multiplied by [].
        gate: 1 where a gated transform found the gradients aligned, 0 where in conflict [];
            None without one.
        decay: The decay a teacher was updated with []; None without one.
        applied: Whether the base optimizer stepped; False after a skipped step.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.PCGrad())
        >>> _ = optimizer.step({"a": lambda: w[0], "b": lambda: w[1] - w[0]})
        >>> optimizer.last_step.cosine("a", "b")
        tensor(-0.7071)
    """

    names: tuple[str, ...]
    losses: Float[Tensor, " K"]
    gram: Float[Tensor, "K K"]
    weights: Float[Tensor, " K"]
    lr_scale: Float[Tensor, ""]
    gate: Float[Tensor, ""] | None
    decay: Float[Tensor, ""] | None
    applied: bool
    _cosines: Float[Tensor, "K K"] = field(repr=False)

    def cosine(self, a: str, b: str) -> Float[Tensor, ""]:
        """The cosine of two objectives' gradients; 0 if one of them is zero.

        Raises:
            ValueError: If the step had no objective of that name.
        """
        for name in (a, b):
            if name not in self.names:
                raise ValueError(
                    f"the step had no objective {name!r}; it had {', '.join(map(repr, self.names))}"
                )
        return self._cosines[self.names.index(a), self.names.index(b)]
