"""SAM that perturbs some parameters and descends on some samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradkit.core.arguments import check_number, own_generator
from gradkit.core.context import Context
from gradkit.core.displacement import Displacement, Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.storage import Parts, Storage
from gradkit.sharpness.ascent import Ascent


@dataclass(eq=False, repr=False)
class ESAM(Ascent):
    """Efficient SAM ([Du et al., ICLR 2022](https://arxiv.org/abs/2110.03141)).

        S   a random subset of the parameter tensors, each with probability β
        ε = ρ·g_S / (β·‖g_S‖)            the gradient's part in S, 0 elsewhere
        step on the mean over the samples whose loss has risen most from w to w + ε: a share γ

    With γ < 1 objectives return one loss per sample, a vector [N] (`reduction="none"`); the
    objective's value is its mean. Samples are chosen for each objective by itself. With
    micro-batches, each yields its own vector, scaled as its mean would be, and the share γ of each
    is taken. (The authors' code keeps one sample fewer, and draws S at the end of the step before,
    so that its first step perturbs all tensors. The defaults are its script's for a ResNet-18.)

    A closure may take an argument `samples`, the indices [k] of samples, None for all. It is then
    called without gradients on all samples, and again on the chosen ones, as in the authors' code:
    the second backward pass costs γ of the first, and BatchNorm in training mode sees the chosen
    samples alone. Any other closure is called once, and only the loss is restricted, at the cost
    of a whole backward pass.

    Cost: 1 + γ gradients and a forward pass for a closure that takes `samples`, else 2. Memory:
    two flat vectors. State: the generator.

    Args:
        rho: The ascent radius ρ ≥ 0.
        beta: β in (0, 1], the probability with which a tensor is perturbed.
        gamma: γ in (0, 1], the share of the samples that are kept, at least one; 1 keeps all, and
            objectives may return their mean.
        generator: A CPU generator that draws the tensors; by default one of its own with seed 0,
            the same in every process.
        only: Which parameters may be displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`. Samples are
            chosen by each rank from its own.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range; in `step`, if an objective returns one
            number although γ < 1, or another number of losses at the second evaluation.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> x = torch.tensor([1.0, 2.0])
        >>> def losses(samples=None):
        ...     chosen = x if samples is None else x[samples]
        ...     return (w * chosen).square() / 2
        >>> base = torch.optim.SGD([w], lr=0.1)
        >>> optimizer = gk.wrap(base, gk.ESAM(rho=1.0, beta=1.0, gamma=0.5))
        >>> optimizer.step(losses)  # the mean of 4.5 and 18
        tensor(11.2500)
        >>> w.data  # the loss of the second sample rises more: 3 - 0.1 * 2 * 2 * (3 + 1)
        tensor([1.4000])
    """

    beta: float = 0.6
    gamma: float = 0.5
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, above=0, most=1)
        check_number("gamma", self.gamma, above=0, most=1)
        self.generator = own_generator(self.generator)
        self._perturbed: list[bool] | None = None

    def around(self, inner: Oracle, context: Context) -> Oracle:
        assert self.generator is not None
        draws = torch.rand(
            len(context.layout.parameters),
            generator=self.generator,
            dtype=torch.float32,
            device="cpu",
        )
        self._perturbed = (draws < self.beta).tolist()

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            sign = -1.0 if context.ascends_everywhere else 1.0
            before = _Before(self, sign)
            with context.sampling(before):
                first = inner(at, only).stored()
            point: Point = context.point(at) + self.rise_along(first, at, context)
            for _ in range(self.steps - 1):
                with context.sampling(_Before(self, sign)):
                    point = self.above(inner(point, only), point, context)
            with context.sampling(_Risen(before)):
                return inner(point, only)

        return oracle

    def rise_along(
        self, vector: Float[Tensor, " P"] | Parts | Storage, at: Point | None, context: Context
    ) -> Displacement:
        return super().rise_along(vector, at, context) * (1 / self.beta)

    @property
    def _takes_whole(self) -> bool:
        return super()._takes_whole and self.beta == 1

    def _chosen(self, context: Context) -> list[bool]:
        drawn = self._perturbed or [True] * len(context.layout.parameters)
        return [a and b for a, b in zip(super()._chosen(context), drawn, strict=True)]


class _Before:
    """Keeps the per-sample losses of the first evaluation.

    Args:
        method: The transform.
        sign: -1 where losses are maximised.
    """

    chooses = False

    def __init__(self, method: ESAM, sign: float) -> None:
        self.method = method
        self.sign = sign
        self.losses: defaultdict[str, list[Tensor]] = defaultdict(list)

    def scalar(self, name: str, losses: Tensor) -> Float[Tensor, ""]:
        if losses.dim() != 1 or len(losses) == 0:
            if self.method.gamma < 1:
                raise ValueError(
                    f"{self.method!r} chooses samples by their losses, and objective {name!r} "
                    f"returned a tensor of shape {tuple(losses.shape)}; return one loss per sample "
                    "[N] (reduction='none', the mean over all but the first dimension), or pass "
                    "gamma=1"
                )
            return losses
        self.losses[name].append(losses.detach())
        return losses.mean()

    def chosen(self, name: str, losses: Float[Tensor, " N"]) -> Int[Tensor, " k"]:
        return torch.arange(len(losses), device=losses.device)


class _Risen:
    """Restricts the second evaluation to the samples whose losses have risen most."""

    def __init__(self, before: _Before) -> None:
        self._method = before.method
        self._sign = before.sign
        self._before: dict[str, Iterator[Tensor]] = {
            name: iter(losses) for name, losses in before.losses.items()
        }
        self._restricted: set[str] = set()

    @property
    def chooses(self) -> bool:
        return self._method.gamma < 1

    def scalar(self, name: str, losses: Tensor) -> Float[Tensor, ""]:
        if losses.dim() != 1:
            return losses
        if name in self._restricted:
            self._restricted.remove(name)
        elif self.chooses:
            losses = losses[self._most(name, losses)]
        return losses.mean()

    def chosen(self, name: str, losses: Float[Tensor, " N"]) -> Int[Tensor, " k"]:
        self._restricted.add(name)
        return self._most(name, losses)

    def _most(self, name: str, losses: Float[Tensor, " N"]) -> Int[Tensor, " k"]:
        before = next(self._before.get(name, iter(())), losses[:0])
        if len(before) != len(losses):
            raise ValueError(
                f"objective {name!r} returned {len(before)} losses at the weights and "
                f"{len(losses)} at the displaced ones, so that their rise is not known; return "
                "those of the same samples each time"
            )
        count = max(1, int(self._method.gamma * len(losses)))
        rise = self._sign * (losses.detach() - before)
        return rise.topk(count).indices.sort().values
