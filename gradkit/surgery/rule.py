"""What the rules of gradient surgery have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.flat import SCOPES, Scope
from gradkit.gradients import Gradients, combine
from gradkit.gram import gram as gram_matrix
from gradkit.oracle import Along, Context, Oracle, Transform, takes_along


class Rule(Transform, ABC):
    """A rule that weights gradients by a function of their Gram matrix.

    Usable in three ways: in `wrap`; alone on a matrix of gradients, `rule(jacobian) -> [P]`; and
    on Gram matrices, `rule.weights(gram) -> [..., K]`, batched over leading dimensions.

    In `wrap` the rule sees the rows wᵢgᵢ of nonzero weight and multiplies their weights by its
    own. With `scope` "group" or "tensor", inner products are taken and gradients combined for
    each parameter group or tensor by itself; the result is then no weighted sum of whole rows,
    so no other rule can follow.
    """

    scope: Scope = "global"

    @abstractmethod
    def weigh(self, gram: Float[Tensor, "*batch K K"], draws: Any) -> Float[Tensor, "*batch K"]:
        """The weights for Gram matrices, given what `draw` drew."""

    def draw(self, count: int) -> Any:
        """The random numbers that one step with `count` gradients needs."""
        return None

    def weights(self, gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K"]:
        """The weights that this rule gives gradients of this Gram matrix."""
        return self.weigh(gram, self.draw(gram.shape[-1]))

    def __call__(self, jacobian: Float[Tensor, "K P"]) -> Float[Tensor, " P"]:
        """The direction that this rule makes of gradients, one a row.

        Raises:
            ValueError: If the rule has a scope other than "global": a bare matrix does not say
                where the parameters lie.
        """
        if self.scope != "global":
            raise ValueError(
                f"{self!r} works by {self.scope}, and a bare matrix does not say where the "
                "parameters lie; use it in gk.wrap(), or with scope='global'"
            )
        weights = self.weights(gram_matrix(jacobian))
        return combine(jacobian, weights, range(len(jacobian)), torch.empty_like(jacobian[0]))

    @property
    def sets_update(self) -> bool:
        """Whether the rule works by group or tensor."""
        return self.scope != "global"

    def around(self, inner: Oracle, context: Context) -> Oracle:  # noqa: D102 # see the class
        drawn: dict[int, Any] = {}

        def oracle(
            at: Float[Tensor, " P"] | Along | None = None, only: Container[str] | None = None
        ) -> Gradients:
            gradients = inner(at, only)
            if gradients.update is not None:
                raise ValueError(
                    f"{self!r} cannot follow a transform that has set the update, which is no "
                    "weighted sum of whole gradients; put it first in wrap()"
                )
            active = list(gradients.active)
            if not active:
                return gradients
            if len(active) not in drawn:
                drawn[len(active)] = self.draw(len(active))
            gram = gradients.gram(self.scope)
            every = len(active) == len(gradients.names)
            old = gradients.weights if every else gradients.weights[active]
            chosen = gram if every else gram[..., active, :][..., :, active]
            new = old * self.weigh(old[:, None] * old * chosen, drawn[len(active)])
            if not every:
                spread = new.new_zeros((*new.shape[:-1], len(gradients.names)))
                spread[..., active] = new
                new = spread
            if self.scope == "global":
                return gradients.replace(weights=new)
            update = context.pool.take_vector()
            for weights, (start, stop) in zip(new, gradients.segments(self.scope), strict=True):
                combine(gradients.rows[:, start:stop], weights, active, update[start:stop])
            return gradients.replace(update=update)

        oracle.takes_along = takes_along(inner)  # type: ignore[attr-defined]  # a function's own
        return oracle


def check_scope(scope: str) -> None:
    """Check a scope given by a user.

    Raises:
        ValueError: If it is none of the three.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; choose one of {', '.join(SCOPES)}")
