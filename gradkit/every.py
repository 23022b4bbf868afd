"""Transforms that take part in every k-th step only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_count
from gradkit.core.context import Context
from gradkit.core.flat import Layout
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.weighing import Weighting

_KEPT = "every_weights"


def Every(k: int, transform: Transform) -> Transform:  # noqa: N802 # it stands for a transform
    """A transform in every k-th step, and a plain step in between, so that any method is cheap.

        steps 0, k, 2k, …     the transform
        all others            what is inside it, unchanged; after a rule that weights objectives,
                              its last weights

    In between a transform's `after_step` is left out, too: a teacher in `Every(10, gk.EMA(...))`
    moves in every tenth step. Its state stays as it is. The auxiliary objective of `LookAhead`
    keeps its weight of 0.

    A rule that weights objectives (`gk.PCGrad`, `gk.MGDA`, …, and those by losses) needs no inner
    products in between. If it comes first, if no other transform reads single gradients, and if one
    closure returns all losses, one backward pass of their weighted sum takes the place of K passes.
    Objectives that were absent in the last k-th step get the weight 1. Elementwise rules have no
    weights: the plain sum takes their place.

    `gk.LookSAM` and `gk.AESAM` are methods of their own, which do better in between than a plain
    step.

    Cost: on average 1 + (c − 1)/k plain steps, if the transform alone costs c. Memory and state:
    the transform's own; the number of steps.

    Args:
        k: Every how many steps the transform takes part, from the first on; 1 is the transform
            itself.
        transform: The transform. Do not pass it to `gk.wrap` as well.

    Raises:
        TypeError: If `k` is no integer, or `transform` no transform.
        ValueError: If `k` is less than 1, or if the transform is a step of its own, such as
            `gk.BSAM`, for which a plain step is no substitute.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> base = torch.optim.SGD([w], lr=0.5)
        >>> optimizer = gk.wrap(base, gk.Every(2, gk.SAM(rho=1.0)))
        >>> for _ in range(2):
        ...     _ = optimizer.step(lambda: w.square().sum() / 2)
        ...     print(round(w.item(), 4))  # 1 - 0.5 * (1 + 1), then 0 - 0.5 * 0
        0.0
        0.0
        >>> rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.Every(2, gk.MGDA()))
        >>> for rows in (rows, -rows):
        ...     _ = optimizer.step(lambda: {"a": rows[0] @ w, "b": rows[1] @ w})
        ...     print(w.grad)  # 0.6 * a + 0.4 * b, both times
        tensor([0., 1., 1.])
        tensor([ 0., -1., -1.])
    """
    if not isinstance(transform, Transform):
        made = f"; write {transform.__name__}()" if isinstance(transform, type) else ""
        raise TypeError(f"transform is a {type(transform).__name__}; pass a transform{made}")
    check_count("k", k)
    if transform.replaces_step:
        raise ValueError(
            f"{transform!r} makes a step of its own out of the gradient, so that a plain step in "
            "between would not go with it; use it in every step"
        )
    if isinstance(transform, _EveryWeighting):  # whose last weights would be kept twice
        k, transform = k * transform.k, transform.transform
    return (
        _EveryWeighting(k, transform) if isinstance(transform, Weighting) else _Every(k, transform)
    )


class _Inside(Transform):
    """Holds a transform, and has its properties."""

    never_zero: bool = False

    def __init__(self, k: int, transform: Transform) -> None:
        self.k = k
        self.transform = transform
        self.generator = transform.generator
        self.joins = transform.joins
        self.divides = transform.divides
        self.needs_several = transform.needs_several
        self.never_zero = getattr(transform, "never_zero", False)

    def __repr__(self) -> str:
        return f"Every({self.k}, {self.transform!r})"

    @property
    def saved_name(self) -> str:
        return f"Every({self.transform.saved_name})"

    @property
    def _key(self) -> str:
        """The name of the number of steps in the state, which may be shared with others."""
        return "every" + "_inside" * _depth(self.transform)

    def _is_due(self, context: Context | None = None) -> bool:
        """Whether the transform takes part in the present step."""
        return (self._steps - (context is not None and context.committed)) % self.k == 0

    @property
    def _steps(self) -> int:
        steps: int | None = self.state[self._key]
        return steps or 0  # None after a reset() of the transform inside

    def _count(self, context: Context) -> None:
        context.propose(self, **{self._key: self._steps + 1})

    @property
    def needs_rows(self) -> bool:  # type: ignore[override]  # an attribute of most transforms
        return self._is_due() and self.transform.needs_rows

    @property
    def student(self) -> Any:
        """The student of a teacher; None for other transforms."""
        return getattr(self.transform, "student", None)

    @property
    def teacher(self) -> Any:
        """The teacher, if the transform has one; None for others."""
        return getattr(self.transform, "teacher", None)

    def belong_to(self, optimizer: object) -> None:
        super().belong_to(optimizer)
        self.transform.belong_to(optimizer)

    def check_free(self, optimizer: object) -> None:
        super().check_free(optimizer)
        self.transform.check_free(optimizer)

    def objection(self, losses: Mapping[str, float]) -> str | None:
        return self.transform.objection(losses) if self._is_due() else None


class _Every(_Inside):
    """Any transform that is more than weights. It shares the state of the one inside."""

    def __init__(self, k: int, transform: Transform) -> None:
        super().__init__(k, transform)
        self.__dict__["_state"] = transform.state
        self.__dict__["_vectors"] = transform.vectors
        self.state[self._key] = 0

    @property
    def per_rank(self) -> bool:
        return self._is_due() and self.transform.per_rank

    @property
    def inside(self) -> tuple[Transform, ...]:
        return (self.transform,)

    @property
    def scope(self) -> Any:
        """The scope of a rule; None for transforms that have none."""
        return getattr(self.transform, "scope", None)

    @property
    def sets_update(self) -> bool:
        return self.transform.sets_update

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return self.transform.initial_vectors(layout)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        self._count(context)
        if self._is_due():
            return self.transform.around(inner, context)
        return self.transform.left_out(inner, context)

    def before_step(self, context: Context) -> None:
        if self._is_due(context):
            self.transform.before_step(context)

    def after_step(self, context: Context) -> None:
        if self._is_due(context):
            self.transform.after_step(context)

    def after_load(self) -> None:
        self.transform.after_load()

    def tensors(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        return self.transform.tensors()

    def check_tensors(self, saved: Mapping[str, Tensor]) -> None:
        self.transform.check_tensors(saved)

    def load_tensors(self, saved: Mapping[str, Tensor], mark: str | None) -> None:
        self.transform.load_tensors(saved, mark)

    def mark(self) -> str | None:
        return self.transform.mark()


class _EveryWeighting(_Inside, Weighting):
    """A rule of weights, with its memory and its last weights."""

    transform: Weighting

    def __init__(self, k: int, transform: Weighting) -> None:
        super().__init__(k, transform)
        self.scope = transform.scope
        if transform.state:  # one memory for both: `FAMO.update` changes it, and a user reads it
            self.__dict__["_state"] = transform.state
            self.state[_KEPT] = None
        self.state[self._key] = 0

    @property
    def needs_gram(self) -> bool:  # type: ignore[override]  # an attribute of most rules
        blocks = self.scope != "global"  # whose gradients are combined block by block anyhow
        return (self._is_due() or blocks) and self.transform.needs_gram

    @property
    def needs_losses(self) -> bool:
        return self._is_due() and self.transform.needs_losses

    def draw(self, count: int) -> Any:
        return self.transform.draw(count) if self._is_due() else None

    def init(self, count: int) -> dict[str, Tensor]:
        return {**self.transform.init(count), _KEPT: torch.ones(count)}

    def weigher(self, context: Context) -> Any:
        self._count(context)
        return super().weigher(context)

    def seen_losses(
        self, losses: Float[Tensor, " K"], weights: Float[Tensor, " K"]
    ) -> Float[Tensor, " K"]:
        return self.transform.seen_losses(losses, weights)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        if not self._is_due():
            return memory[_KEPT], memory
        before = {key: value for key, value in memory.items() if key != _KEPT}
        weights, after = self.transform.weigh(inputs, before)
        return weights, {**after, _KEPT: weights}


def _depth(transform: Transform) -> int:
    return 1 + _depth(transform.transform) if isinstance(transform, _Inside) else 0
