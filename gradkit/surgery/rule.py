"""What the rules of gradient surgery have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import combine
from gradkit.core.context import Context
from gradkit.core.flat import SCOPES, Scope
from gradkit.core.gradients import Gradients
from gradkit.core.gram import accumulator
from gradkit.core.gram import gram as gram_matrix
from gradkit.core.transform import Reweighing, Transform, Weigh
from gradkit.surgery.given import Given, check_remembered
from gradkit.surgery.remembering import Remembering
from gradkit.surgery.semidefinite import check_gram_matrix


class Rule(Transform, ABC):
    """A rule that makes one direction of several gradients.

    Usable in two ways: in `wrap`, and alone on a matrix of gradients, `rule(jacobian) -> [P]`. In
    `wrap` it sees the rows wᵢgᵢ of nonzero weight.
    """

    joins = True
    needs_several = True
    degree: float | None = 1.0
    """The rule's homogeneity: the direction for s·J is s^degree times that for J, for any s > 0.

    None where there is no such degree.
    """

    @abstractmethod
    def __call__(self, jacobian: Float[Tensor, "K P"]) -> Float[Tensor, " P"]:
        """The direction that this rule makes of gradients, one a row."""


class GramRule(Remembering, Rule, Reweighing):
    """A rule that weights gradients by a function of their Gram matrix.

    Usable in a third way, on Gram matrices: `rule.weights(gram) -> [..., K]`, batched over leading
    dimensions.

    Gradients that are not finite give a direction of NaNs where it depends on them; `weights`
    refuses matrices that are not finite.

    In `wrap` the rule multiplies the weights of the rows it sees by its own. With `scope` "group"
    or "tensor", inner products are taken and gradients combined for each parameter group or tensor
    by itself. With "shared" they are taken over the parameters in which at least two objectives
    have a gradient that is not 0, a trunk's; what belongs to one of them, such as its head, gets
    that one's gradient as it is.
    The result is then no weighted sum of whole rows, so no other rule can follow.

    A rule may remember something of each objective: see `initial_memory`. A step learns from each
    objective's first evaluation in it, which is that at the step's own weights; at displaced ones
    (SAM around the rule) the rule starts from the same memory and learns nothing. In an optimizer
    only applied steps change what it remembers, and it is saved with the optimizer's state. Alone,
    each call does; `reset` forgets.
    """

    scope: Scope = "global"
    needs_gram: bool = True
    """Whether the weights depend on the Gram matrix at all; otherwise it may hold anything."""

    needs_symmetry: bool = True
    """Whether the Gram matrix has to be that of one set of gradients, not J₁·J₂ᵀ of two."""

    @abstractmethod
    def weigh(self, gram: Float[Tensor, "*batch K K"], given: Given) -> Float[Tensor, "*batch K"]:
        """The weights for Gram matrices, which come in float64."""

    @property
    def needs_losses(self) -> bool:
        """Whether the rule works on losses, too."""
        return False

    def weights(
        self, gram: Float[Tensor, "*batch K K"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, "*batch K"]:
        """The weights that this rule gives gradients of this Gram matrix.

        Looks at the numbers in `gram`, which takes no notice of rounding errors; in a step, where
        Gram matrices are the library's own, nothing is looked at.

        Args:
            gram: Gram matrices of the gradients.
            losses: The objectives' losses, for rules that need them.

        Raises:
            ValueError: If a matrix is not square, finite, symmetric and positive semidefinite.
        """
        gram = checked_gram(gram)
        if self.needs_gram:
            check_gram_matrix(self, gram, symmetric=self.needs_symmetry)
        return self._weights_alone(gram, losses)

    def _weights_alone(
        self, gram: Float[Tensor, "*batch K K"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, "*batch K"]:
        """As `weights`, of any square matrices; NaN gives NaN."""
        wide = gram.to(accumulator(gram.device))
        count = gram.shape[-1]
        names = tuple(map(str, range(count)))
        losses = None if losses is None else checked_losses(losses, count)
        with self._called_alone() as state:
            memory = self._recall(names, wide, gram.shape[:-2], state)
            given = Given(self.draw(count), losses, names, memory.of_present())
            weights = self._checked(self.weigh(wide, given), wide)
            state.update(memory.with_present(given.remembered))
        return weights.to(gram.dtype)

    def _checked(
        self, weights: object, gram: Float[Tensor, "*batch K K"]
    ) -> Float[Tensor, "*batch K"]:
        """What `weigh` returned, if it can be weights."""
        if isinstance(weights, Tensor) and weights.shape == gram.shape[:-1]:
            return weights
        what = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"weigh() of {self!r} returned {what} for Gram matrices of shape {tuple(gram.shape)}; "
            f"return one weight for each objective, a tensor of shape {tuple(gram.shape[:-1])}"
        )

    def __call__(
        self, jacobian: Float[Tensor, "K P"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, " P"]:
        """The direction that this rule makes of gradients, one a row.

        Args:
            jacobian: The gradients.
            losses: The objectives' losses, for rules that need them.

        Raises:
            ValueError: If the rule has a scope other than "global": a bare matrix does not say
                where the parameters lie.
        """
        if self.scope != "global":
            raise ValueError(
                f"{self!r} works by {self.scope}, and a bare matrix does not say where the "
                "parameters lie; use it in gk.wrap(), or with scope='global'"
            )
        jacobian = checked_jacobian(jacobian)
        weights = self._weights_alone(gram_matrix(jacobian), losses)
        return combine(jacobian, weights, range(len(jacobian)), torch.empty_like(jacobian[0]))

    @property
    def sets_update(self) -> bool:
        """Whether the rule works by group or tensor, or on shared parameters."""
        return self.scope != "global"

    @property
    def reweighs(self) -> bool:
        """Whether the rule works on whole gradients."""
        return self.scope == "global"

    def weigher(self, context: Context) -> Weigh:
        drawn: dict[int, Any] = {}
        evaluated: set[str] = set()
        return lambda gradients: self._reweighed(gradients, drawn, evaluated, context)

    def _reweighed(
        self,
        gradients: Gradients,
        drawn: dict[int, Any],
        evaluated: set[str],
        context: Context,
    ) -> Gradients:
        seen_rows = active_rows(self, gradients)
        before = frozenset(evaluated)
        evaluated.update(gradients.names)
        shared = gradients.shared(seen_rows) if self.scope == "shared" else None
        active = list(seen_rows if shared is None else shared.rows)
        if not active:
            return gradients
        if len(active) not in drawn:
            drawn[len(active)] = self.draw(len(active))
        every = len(active) == len(gradients.names)
        old = gradients.weights if every else gradients.weights[active]
        if self.needs_gram:
            gram = gradients.gram(self.scope) if shared is None else shared.gram
            chosen = gram if every else gram[..., active, :][..., :, active]
        else:
            chosen = old.new_zeros(len(active), len(active))
        names = tuple(gradients.names[k] for k in active)
        given = Given(drawn[len(active)], names=names, every=context.names or names)
        if self.needs_losses:
            context.require_losses(self, names)
            given.losses = gradients.losses[active].to(old) * old
        memory = None
        if self.state:
            keys, batch = block_keys(self.scope, context), chosen.shape[:-2]
            memory = self._recall(names, chosen, batch, self.state, keys, self.scope)
            given.memory = memory.of_present()
        weighted = old[:, None] * old * chosen
        new = old * self._checked(self.weigh(weighted, given), weighted)
        if memory is None:
            check_remembered(self, given.remembered, {})
        # A second look at an objective, at displaced weights, teaches nothing.
        first = [name not in before for name in names]
        if memory is not None and any(first):
            learnt = context.proposed(self)
            if learnt:  # from another evaluation in this step, of other objectives
                state = {**self.state, **learnt}
                memory = self._recall(names, chosen, batch, state, keys, self.scope)
            learns = None if all(first) else first
            context.propose(self, **memory.with_present(given.remembered, learns))
        if not every:
            spread = new.new_zeros((*new.shape[:-1], len(gradients.names)))
            spread[..., active] = new
            new = spread
        if self.scope == "global":
            return gradients.replace(weights=new)
        if shared is None:
            blocks = zip(new, gradients.segments(self.scope), strict=True)
            parts = [(weights, span, active) for weights, span in blocks]
        else:
            parts = [(new, span, active) for span in shared.spans]
            parts += [(gradients.weights, span, list(seen_rows)) for span in shared.others]
        update = context.pool.take_vector()
        for weights, (start, stop), rows in parts:
            combine(gradients.rows[:, start:stop], weights, rows, update[start:stop])
        seen = None if shared is None else shared.gram
        return gradients.replace(update=update, seen_gram=seen)


def active_rows(rule: Rule, gradients: Gradients) -> tuple[int, ...]:
    """The rows that a rule sees.

    Raises:
        ValueError: If the update has been set already.
    """
    if gradients.has_update:
        raise ValueError(
            f"{rule!r} cannot follow a transform that has set the update, which is no "
            "weighted sum of whole gradients; put it first in wrap()"
        )
    return gradients.active


def checked_jacobian(jacobian: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
    """A matrix of gradients given by a user, without its graph.

    Raises:
        TypeError: If it is no tensor of floating-point numbers.
        ValueError: If it is no matrix with at least one row.
    """
    if not isinstance(jacobian, Tensor) or not jacobian.is_floating_point():
        what = jacobian.dtype if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise TypeError(f"the gradients are {what}; pass a tensor of floating-point numbers [K, P]")
    if jacobian.dim() != 2 or len(jacobian) == 0:
        raise ValueError(
            f"the gradients have shape {tuple(jacobian.shape)}; pass a matrix [K, P], one gradient "
            "a row"
        )
    return jacobian.detach()


def checked_gram(gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K K"]:
    """Gram matrices given by a user, without their graph.

    Raises:
        TypeError: If they are no tensor of floating-point numbers.
        ValueError: If they are not square, with at least one row.
    """
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        what = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"the Gram matrix is {what}; pass a tensor of floating-point numbers")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(
            f"the Gram matrix has shape {tuple(gram.shape)}; pass [..., K, K], K at least 1"
        )
    return gram.detach()


def checked_losses(losses: Float[Tensor, " K"], count: int | None = None) -> Float[Tensor, " K"]:
    """Losses given by a user, without their graph.

    Raises:
        TypeError: If they are no tensor of floating-point numbers.
        ValueError: If there is not one for each of `count` objectives, or none at all.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        what = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"the losses are {what}; pass a tensor of floating-point numbers [K]")
    if losses.dim() != 1 or len(losses) != (count or len(losses)) or len(losses) == 0:
        raise ValueError(
            f"the losses have shape {tuple(losses.shape)}; pass one for each objective"
            + (f", {count} in all" if count else "")
        )
    return losses.detach()


def block_keys(scope: Scope, context: Context) -> list[str] | None:
    """What identifies the blocks of a scope, whichever parameters are frozen; None for one block.

    Positions of groups, or of tensors in them.
    """
    if scope in ("global", "shared"):
        return None
    if scope == "group":
        return [f"group {group}" for group in dict.fromkeys(context.layout.groups)]
    every = (p for group in context.base.param_groups for p in group["params"])
    places = {parameter: place for place, parameter in enumerate(every)}
    return [f"tensor {places[parameter]}" for parameter in context.layout.parameters]


def check_scope(scope: str) -> None:
    """Check a scope given by a user.

    Raises:
        ValueError: If it is none of the three.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; choose one of {', '.join(SCOPES)}")


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """A generator given by a user, or else a new one with seed 0, the same in every process.

    Raises:
        TypeError: If it is none.
        ValueError: If it is not on the CPU.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}; pass torch.Generator().manual_seed(...)")
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}; pass one on the CPU, whose numbers are the same "
            "in every process"
        )
    return generator
