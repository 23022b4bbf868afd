"""Methods of the tests' own, with everything that a method may have."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import gradkit as gk
from gradkit.core.arguments import check_number, own_generator
from gradkit.core.flat import Scope
from gradkit.core.gram import cosines
from gradkit.surgery import ElementwiseRule, GramRule
from gradkit.surgery.inputs import Preference, check_preference
from surgery.table import Entry, of_class


@dataclass(eq=False)
class Recalling(GramRule):
    """Weights by cosines and lengths as they were on average; remembers all shapes there are.

    Homogeneous of degree 1. Cost: none. State: cosines, shares and a number. https://example.org
    """

    beta: float = 0.5
    preference: Preference | None = None
    scope: Scope = "global"

    def __post_init__(self):
        check_number("beta", self.beta)
        check_preference("preference", self.preference, least=0)

    def init(self, count):
        return {
            "cosines": torch.zeros(count, count),
            "shares": torch.ones(count),
            "steps": torch.zeros(()),
        }

    def weigh(self, inputs, memory):
        gram = inputs.gram
        lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        total = lengths.sum(-1, keepdim=True)
        share = lengths / torch.where(total == 0, torch.ones_like(total), total)
        steps = memory["steps"] + 1
        learnt = {
            "cosines": torch.lerp(memory["cosines"], cosines(gram), self.beta),
            "shares": torch.lerp(memory["shares"], share, self.beta),
            "steps": steps,
        }
        weights = learnt["shares"] + learnt["cosines"].mean(-1).abs()
        if self.preference is not None:
            weights = weights * inputs.numbers(self.preference, gram)
        return weights * (1 + 1 / steps[..., None]), learnt


@dataclass(eq=False)
class Drawn(GramRule):
    """Random weights divided by lengths.

    Homogeneous of degree 0. Cost: none. State: the generator. https://example.org
    """

    degree = 0.0
    scope: Scope = "global"
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self):
        self.generator = own_generator(self.generator)

    def draw(self, count):
        return torch.rand(count, generator=self.generator, dtype=torch.float64) + 0.1

    def weigh(self, inputs, memory):
        gram = inputs.gram
        lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        lengths = torch.where(lengths == 0, torch.ones_like(lengths), lengths)
        return inputs.draws.to(gram) / lengths, memory


@dataclass(eq=False)
class ByLosses(GramRule):
    """Losses and cosines, remembered by objective.

    Homogeneous of degree 1. Cost: none. State: the first losses. https://example.org
    """

    needs_losses = True
    scope: Scope = "global"

    def init(self, count):
        return {"first": torch.full((count,), torch.nan)}

    def weigh(self, inputs, memory):
        gram = inputs.gram
        losses = inputs.needed_losses(self).expand(gram.shape[:-1])
        first = torch.where(memory["first"].isnan(), losses, memory["first"])
        return losses.to(gram) / first + cosines(gram).sum(-1).abs(), {"first": first}


@dataclass(eq=False)
class Signs(ElementwiseRule):
    """The sum where all signs agree.

    Homogeneous of degree 1. Cost: none. State: none. https://example.org
    """

    def merge(self, rows, noise, prepared):
        signs = rows.sign().sum(0).abs()
        total = rows.sum(0)
        return torch.where(total.isnan() | (signs == len(rows)), total, 0)  # NaN has the sign 0


@dataclass(eq=False)
class Dropped(ElementwiseRule):
    """Positive or negative numbers, by chance.

    Homogeneous of degree 1. Cost: none. State: the generator. https://example.org
    """

    noise = "uniform"
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self):
        self.generator = own_generator(self.generator)

    def merge(self, rows, noise, prepared):
        total, size = rows.sum(0), rows.abs().sum(0)
        share = (1 + total / torch.where(size == 0, torch.ones_like(size), size)) / 2
        sign = torch.where(share.isnan(), share, torch.where(share > noise, 1.0, -1.0))
        return (rows * (rows * sign > 0)).sum(0) + 0 * sign


@dataclass(eq=False)
class Filled(ElementwiseRule):
    """Noise as large as the mean of all columns.

    Homogeneous of degree 1. Cost: none. State: the generator. https://example.org
    """

    noise = "normal"
    scale: float = 1.0
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self):
        check_number("scale", self.scale)
        self.generator = own_generator(self.generator)

    def prepare(self, blocks, over):
        total = torch.zeros(2, dtype=torch.float64)
        for block in blocks:
            total += torch.stack([block.abs().double().sum(), torch.tensor(float(block.numel()))])
        if over is not None:
            over.add_up(total)
        return total[0] / total[1]

    def merge(self, rows, noise, prepared):
        return rows.sum(0) + self.scale * noise.to(rows.dtype) * prepared.to(rows.dtype)


class Averaging(gk.Transform):
    """Adds a running mean of each objective's gradients, which it learns of only in a step."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = own_generator(generator)
        self.state["objectives"] = None

    def initial_vectors(self, layout):
        names = self.state["objectives"] or []
        return {f"mean of {n}": torch.zeros(layout.numel, dtype=layout.dtype) for n in names}

    def around(self, inner, context):
        share = float(torch.rand((), generator=self.generator))
        known = dict.fromkeys(self.state["objectives"] or [])

        def oracle(at=None, only=None):
            gradients = inner(at, only)
            known.update(dict.fromkeys(gradients.names))
            means = {}
            for name, row in zip(gradients.names, gradients.rows, strict=True):
                old = self.vectors.get(f"mean of {name}", torch.zeros_like(row))
                means[f"mean of {name}"] = torch.lerp(old, row, 0.5 + share / 2)
            context.propose(self, objectives=list(known))
            context.propose_vectors(self, **means)
            return gradients.replace(rows=torch.stack([*means.values()]))

        return oracle


OWN_CLASSES = (Recalling, Drawn, ByLosses, Signs, Dropped, Filled, Averaging)
OWN = {cls.__name__: Entry(of_class(cls)) for cls in OWN_CLASSES}
OWN["Drawn"] = Entry(of_class(Drawn), ordered="each objective draws a weight")
OWN_GRAM_RULES = ["Recalling", "Drawn", "ByLosses"]
OWN_ELEMENTWISE_RULES = ["Signs", "Dropped", "Filled"]
