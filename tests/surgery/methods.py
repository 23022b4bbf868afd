"""Making methods, and steps on objectives whose gradients and losses are given."""

from __future__ import annotations

import torch
from helpers import seeded
from torch import Tensor, nn

import gradkit as gk
from gradkit.surgery import GramRule, Rule
from surgery.dummies import OWN, OWN_ELEMENTWISE_RULES, OWN_GRAM_RULES
from surgery.table import ELEMENTWISE_RULES, EXPORTED, GRAM_RULES, losses

METHODS = {**EXPORTED, **OWN}
GRAM = [*GRAM_RULES, *OWN_GRAM_RULES]
ELEMENTWISE = [*ELEMENTWISE_RULES, *OWN_ELEMENTWISE_RULES]

NAMES = "abcdefgh"
SIZES = (3, 1, 4, 2)
GROUPS = ((0, 2), (2, 4))
BLOCKS = {
    "global": [(0, 10)],
    "group": [(0, 4), (4, 10)],
    "tensor": [(0, 3), (3, 4), (4, 8), (8, 10)],
}


def made(name: str, count: int, seed: int | None = None, **options: object) -> gk.Transform:
    """A new method for so many objectives; of this seed, if it draws random numbers."""
    method = METHODS[name].make(count, **options)
    if seed is not None and method.generator is not None:
        method.generator.manual_seed(seed)
    return method


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def alone(rule: Rule, jacobian: Tensor, step: int = 0) -> Tensor:
    """What the rule makes of a bare matrix, and of the losses in some step."""
    if isinstance(rule, GramRule):
        return rule(jacobian, losses(len(jacobian), step))
    return rule(jacobian)


def weights(rule: GramRule, gram: Tensor, step: int = 0) -> Tensor:
    """Also of a Gram matrix that is not finite, as there may be in a step."""
    given = losses(gram.shape[-1], step).to(gram)
    return (rule.weights if gram.isfinite().all() else rule.weigh_alone)(gram, given)


def matrices(count: int) -> dict[str, Tensor]:
    """Gradients [K, 8] that rules meet in practice, or fear."""
    plain = normal(count, 8, seed=count)
    first = plain[0]
    scales = torch.logspace(-6, 6, count, dtype=torch.float64)[:, None]
    zero, opposite, near, double = (plain.clone() for _ in range(4))
    zero[count // 2] = 0
    opposite[-1] = -first
    near[-1] = first * (1 + 1e-9)
    double[-1] = first
    flat = plain.clone()
    flat[:, 2:] = 0
    line = plain.clone()
    line[:, 1:] = 0
    return {
        "plain": plain,
        "equal": first.expand(count, -1).clone(),
        "two equal": double,
        "two nearly equal": near,
        "two opposite": opposite,
        "balanced": plain - plain.mean(0),
        "one zero": zero,
        "all zero": torch.zeros_like(plain),
        "parallel": normal(count, 1, seed=3) * first,
        "orthogonal": torch.eye(count, 8, dtype=torch.float64),
        "in two dimensions": flat,
        "in one dimension": line,
        "mixed lengths": scales * plain,
        "mixed lengths, two equal": scales * double,
        "tiny": 1e-6 * plain,
        "huge": 1e6 * plain,
    }


class Training:
    """Steps of size 1 on objectives whose gradients and losses are given."""

    def __init__(
        self,
        *transforms: gk.Transform,
        parameters: list[nn.Parameter] | None = None,
        dtype: torch.dtype = torch.float64,
        **options: object,
    ) -> None:
        if parameters is None:
            parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in SIZES]
            groups = [{"params": parameters[start:stop]} for start, stop in GROUPS]
        else:
            groups = [{"params": parameters}]
        self.parameters = parameters
        self.optimizer = gk.wrap(torch.optim.SGD(groups, lr=1.0), *transforms, **options)

    def step(self, rows: Tensor, values: Tensor | None = None, names: str = NAMES) -> Tensor:
        """The direction of a step; losses are the usual ones if none are given."""
        values = losses(len(rows)) if values is None else values
        start = [parameter.detach().clone() for parameter in self.parameters]
        sizes = [parameter.numel() for parameter in self.parameters]

        def objective(row: Tensor, value: Tensor):
            parts = [
                part.view(old.shape) for part, old in zip(row.split(sizes), start, strict=True)
            ]

            def loss() -> Tensor:
                triples = zip(self.parameters, start, parts, strict=True)
                return sum((((now - old) * part).sum() for now, old, part in triples), value)

            return loss

        pairs = zip(names, rows, values, strict=False)  # fewer objectives than names
        self.optimizer.step({name: objective(row, value) for name, row, value in pairs})
        moved = zip(start, self.parameters, strict=True)
        return torch.cat([(old - now.detach()).reshape(-1) for old, now in moved])
