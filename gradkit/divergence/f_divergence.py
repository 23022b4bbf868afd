"""What all f-divergences have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.divergence.floor import (
    LIMIT,
    finite_logs,
    in_float32,
    log_complement,
    lowered,
    raised,
)

GAUSSIAN = "kl, reverse_kl, jeffreys, hellinger, pearson, neyman, alpha"


@dataclass(frozen=True)
class FDivergence(ABC):
    """An f-divergence D(P‖Q) = Σ q·f(p/q), of a convex f; made by `gk.f_divergence`.

    f-divergences are due to Csiszár and to [Ali and Silvey,
    1966](https://doi.org/10.1111/j.2517-6161.1966.tb00626.x); conjugates, activations and the bound
    are those of f-GAN ([Nowozin et al., NeurIPS 2016](https://arxiv.org/abs/1606.00709)).

    All computations are in float32 or the inputs' wider dtype, also under autocast.

    Attributes:
        curvature: f''(1): near P = Q the divergence is ½·f''(1)·Σ(p − q)²/q. None where f has no
            second derivative there.
        offset: f(1) = D(P‖P): 0, but for "gan".

    Args:
        normalize: Whether f is divided by f''(1), so that all divergences agree near P = Q, and one
            weight in a loss fits all of them.

    Raises:
        ValueError: With `normalize`, if f has no second derivative at 1.
    """

    _: KW_ONLY
    normalize: bool = False

    name: ClassVar[str]
    curvature: ClassVar[float | None]
    zero: ClassVar[float] = 0.0  # f(1) before it is divided

    def __post_init__(self) -> None:
        if self.normalize and self.curvature is None:
            raise ValueError(
                f"normalize divides by f''(1), which {self.name!r} does not have; pass "
                "normalize=False"
            )

    @property
    def offset(self) -> float:
        """f(1) = D(P‖P): 0, but for "gan"."""
        return self.zero / self._divisor

    @property
    def _divisor(self) -> float:
        return self.curvature if self.normalize and self.curvature is not None else 1.0

    def generator(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f(u), for ratios u = p/q ≥ 0."""
        return self._generator(*in_float32(u)) / self._divisor

    def derivative(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f'(u); 0 where f has a kink at 1."""
        return self._derivative(*in_float32(u)) / self._divisor

    def conjugate(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f*(t) = sup_u (u·t − f(u)), the convex conjugate; +∞ outside its domain."""
        return self._conjugate(in_float32(t)[0] * self._divisor) / self._divisor

    def activation(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A function from all real numbers to the domain of f*, for the outputs of a critic."""
        return self._activation(*in_float32(v)) / self._divisor

    def between(
        self,
        log_p: Float[Tensor, "*batch C"],
        log_q: Float[Tensor, "*batch C"],
        *,
        multi_label: bool = False,
    ) -> Float[Tensor, "*batch"]:
        """D(P‖Q) of distributions over C classes, given by the logarithms of their probabilities.

        All summands are at least 0, so that small divergences keep their relative accuracy: they
        are those of f(u) − f'(1)·(u − 1), whose divergence is the same. Probabilities are not
        checked: they must add up to 1.

        Log-ratios are bounded by ±30 (for "alpha" by 60/max(2, |α|, |α − 1|)): of two
        probabilities the smaller counts as at least e^−30 times the larger. So values and gradients
        are finite where a probability is 0. Below the bound gradients are those at the bound and
        not 0.

        Args:
            log_p: Logarithms of P's probabilities; −∞ is allowed.
            log_q: Logarithms of Q's probabilities.
            multi_label: Whether the C channels do not exclude each other: `log_p` then has the
                logarithm of each channel's probability, a log-sigmoid, and the result is the mean
                over channels of the divergences between (p, 1 − p) and (q, 1 − q).

        Raises:
            ValueError: If the shapes differ.
        """
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"log_p has shape {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}; pass two of "
                "one shape, with the classes in the last dimension"
            )
        log_p, log_q = in_float32(log_p, log_q)
        if multi_label:
            pairs = [torch.stack((each, log_complement(each)), -1) for each in (log_p, log_q)]
            return self.between(*pairs).mean(-1)
        log_p, log_q = finite_logs(log_p), finite_logs(log_q)
        a = raised(log_p, log_q.detach() - self._limit)
        b = raised(log_q, log_p.detach() - self._limit)
        return self._summands(a.exp(), b.exp(), a - b).sum(-1) / self._divisor + self.offset

    def between_gaussians(
        self,
        mean_p: Float[Tensor, "*batch C"],
        variance_p: Float[Tensor, "*batch C"],
        mean_q: Float[Tensor, "*batch C"],
        variance_q: Float[Tensor, "*batch C"],
    ) -> Float[Tensor, "*batch"]:
        """D(P‖Q) of normal distributions in C dimensions with diagonal covariances.

        In closed form. "pearson", "neyman" and some "alpha" are infinite where the tails of one
        distribution are too heavy for the other (for "pearson" where 2·variance_q ≤ variance_p).

        Args:
            mean_p: P's means.
            variance_p: P's variances, positive.
            mean_q: Q's means.
            variance_q: Q's variances, positive.

        Raises:
            ValueError: If the divergence has no closed form, or if shapes differ.
        """
        given = (mean_p, variance_p, mean_q, variance_q)
        if len({tensor.shape for tensor in given}) > 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            raise ValueError(
                f"means and variances have the shapes {shapes}; pass four of one shape, with the "
                "dimensions of the space last"
            )
        return self._between_gaussians(*in_float32(*given)) / self._divisor

    def variational(
        self, v_p: Float[Tensor, "*samples_p"], v_q: Float[Tensor, "*samples_q"]
    ) -> Float[Tensor, ""]:
        """A lower bound of D(P‖Q) from a critic's outputs: E_P[g(v)] − E_Q[f*(g(v))].

        g is the activation. The bound is tight for the critic `critic(log p/q)`. Outputs are
        bounded by those of the critic at log-ratios of ±30, where gradients pass; so the bound
        stays finite, and is one of a bounded critic.

        Args:
            v_p: The critic's outputs for samples of P.
            v_q: Its outputs for samples of Q.
        """
        v_p, v_q = in_float32(v_p, v_q)
        low, high = self.critic(-self._limit), self.critic(self._limit)
        v_p, v_q = (lowered(raised(v, low), high) for v in (v_p, v_q))
        mean = self._activation(v_p).mean() - self._conjugate_of_activation(v_q).mean()
        return mean / self._divisor

    @abstractmethod
    def critic(self, log_ratio: float) -> float:
        """The best critic's output where log p/q is this: the v with g(v) = f'(p/q)."""

    @property
    def _limit(self) -> float:
        return LIMIT

    # Of f itself, not divided; inputs are float32 or wider.

    @abstractmethod
    def _generator(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _derivative(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _conjugate(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _activation(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        """f*(g(v)), which is finite also where g(v) is rounded to the end of the domain."""

    @abstractmethod
    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        """q·[f(u) − f(1) − f'(1)·(u − 1)] without cancellation, u = p/q."""

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        raise ValueError(
            f"{self.name!r} has no closed form between normal distributions; choose one of "
            f"{GAUSSIAN}"
        )


def inside(
    t: Float[Tensor, "*shape"], domain: Tensor, safe: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The argument, with a safe number outside the domain, and what to add there: 0 or +∞."""
    outside = torch.where(domain, 0.0, torch.inf).to(t)
    return torch.where(domain, t, safe), outside
