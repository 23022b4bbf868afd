"""The base classes for rules of gradient surgery, and checks of their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import combine
from gradkit.core.flat import SCOPES, Scope
from gradkit.core.gram import accumulator
from gradkit.core.gram import gram as gram_matrix
from gradkit.core.transform import Transform
from gradkit.surgery.semidefinite import check_gram_matrix
from gradkit.surgery.weighing import Weighting


class Rule(Transform, ABC):
    """Base class for rules that combine several gradients to one direction.

    A rule can be used in `wrap`, and alone on a matrix of gradients, `rule(jacobian) -> [P]`. In
    `wrap` it works on the weighted rows wᵢgᵢ of nonzero weight. Its `scope`, if it has one, is
    checked whenever it is set.
    """

    joins = True
    needs_several = True
    degree: float | None = 1.0
    """The degree of homogeneity: the direction for s·J is s^degree times that for J, for any s > 0.

    None if the rule is not homogeneous.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "scope" and value not in SCOPES:
            raise ValueError(f"scope is {value!r}; choose one of {', '.join(SCOPES)}")
        super().__setattr__(name, value)

    @abstractmethod
    def __call__(self, jacobian: Float[Tensor, "K P"]) -> Float[Tensor, " P"]:
        """The direction for a matrix of gradients, one per row."""


class GramRule(Weighting, Rule):
    """Base class for rules that weight gradients by a function of their Gram matrix.

    See `Weighting`. Such a rule can also be used on Gram matrices, batched over leading dimensions:
    `rule.weights(gram) -> [..., K]`.

    Gradients that are not finite give NaNs in a direction that depends on them; `weights` refuses
    matrices that are not finite.
    """

    needs_symmetry: bool = True
    """Whether the Gram matrix must be that of one set of gradients, not J₁·J₂ᵀ of two sets."""

    def weights(
        self, gram: Float[Tensor, "*batch K K"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, "*batch K"]:
        """The rule's weights for these Gram matrices.

        The matrices are checked, up to rounding errors. In a step the library computes the Gram
        matrices itself and does not check them.

        Args:
            gram: Gram matrices of the gradients.
            losses: The objectives' losses, for rules that need them.

        Raises:
            TypeError: If an argument is not a tensor of floating-point numbers.
            ValueError: If a matrix is not square, finite, symmetric and positive semidefinite, or
                if losses are missing or not one for each objective.
        """
        gram = checked_gram(gram)
        if self.needs_gram:
            check_gram_matrix(self, gram, symmetric=self.needs_symmetry)
        return self._weights_alone(gram, losses)

    def _weights_alone(
        self, gram: Float[Tensor, "*batch K K"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, "*batch K"]:
        """As `weights`, without a check of the matrices; NaN gives NaN."""
        losses = None if losses is None else checked_losses(losses, gram.shape[-1])
        return self.weigh_alone(gram.to(accumulator(gram.device)), losses).to(gram.dtype)

    def __call__(
        self, jacobian: Float[Tensor, "K P"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, " P"]:
        """The direction for a matrix of gradients, one per row.

        Args:
            jacobian: The gradients.
            losses: The objectives' losses, for rules that need them.

        Raises:
            TypeError: If an argument is not a tensor of floating-point numbers.
            ValueError: If the rule has a scope other than "global", since a bare matrix does not
                say where the parameters lie; if the gradients are not a matrix; or if losses are
                missing or not one for each objective.
        """
        check_is_global(self, self.scope)
        jacobian = checked_jacobian(jacobian)
        weights = self._weights_alone(gram_matrix(jacobian), losses)
        return combine(jacobian, weights, range(len(jacobian)), torch.empty_like(jacobian[0]))


def checked_jacobian(jacobian: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
    """A matrix of gradients, checked and detached.

    Raises:
        TypeError: If it is not a tensor of floating-point numbers.
        ValueError: If it is not a matrix with at least one row.
    """
    _check_floating("the gradients are", jacobian, " [K, P]")
    if jacobian.dim() != 2 or len(jacobian) == 0:
        raise ValueError(
            f"the gradients have shape {tuple(jacobian.shape)}; pass a matrix [K, P], one gradient "
            "a row"
        )
    return jacobian.detach()


def checked_gram(gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K K"]:
    """Gram matrices, checked and detached.

    Raises:
        TypeError: If they are not a tensor of floating-point numbers.
        ValueError: If they are not square, with at least one row.
    """
    _check_floating("the Gram matrix is", gram)
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(
            f"the Gram matrix has shape {tuple(gram.shape)}; pass [..., K, K], K at least 1"
        )
    return gram.detach()


def checked_losses(losses: Float[Tensor, " K"], count: int | None = None) -> Float[Tensor, " K"]:
    """Losses, checked and detached.

    Raises:
        TypeError: If they are not a tensor of floating-point numbers.
        ValueError: If they are not a vector with one loss for each of `count` objectives, or with
            at least one loss if `count` is None.
    """
    _check_floating("the losses are", losses, " [K]")
    if losses.dim() != 1 or len(losses) != (count or len(losses)) or len(losses) == 0:
        raise ValueError(
            f"the losses have shape {tuple(losses.shape)}; pass one for each objective"
            + (f", {count} in all" if count else "")
        )
    return losses.detach()


def _check_floating(what: str, value: object, shape: str = "") -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what} {kind}; pass a tensor of floating-point numbers{shape}")


def check_is_global(rule: Rule, scope: Scope) -> None:
    """Check that a rule can be called on a bare matrix.

    Raises:
        ValueError: If its scope is another one than "global".
    """
    if scope != "global":
        raise ValueError(
            f"{rule!r} works by {scope}, and a bare matrix does not say where the parameters lie; "
            "use it in gk.wrap(), or with scope='global'"
        )
