"""The step uphill that sharpness-aware methods take before they evaluate the gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_count, check_number
from gradkit.core.blocks import in_blocks
from gradkit.core.context import Context
from gradkit.core.displacement import Displacement, LazySum, Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.storage import Parts, Storage
from gradkit.core.transform import Transform

Only = Literal["norm"] | Callable[[str, nn.Parameter], bool]
"""Which parameters are displaced: those of normalisation layers, or those for which a function of
name and parameter says so."""

Radius = float | Callable[[float | Float[Tensor, ""]], float]
"""An ascent radius, or a function of a group's learning rate."""

_NORM = re.compile(r"Norm(?![a-z])|Norm[a-z]+ation")  # RMSNorm, and not NormalHead
_TINY = 1e-12
_NONE_CHOSEN = (
    "{}(only=) displaces the parameters that its function chooses, and it has chosen none of those "
    "from {!r} to {!r}; return True for some (their names are those in the model that gk.wrap() "
    "gets as model=)"
)
_OPTIONS = ("only", "adaptive", "eta", "steps", "sync_perturbation")


@dataclass(eq=False, repr=False)
class Ascent(Transform):
    """Base class of methods that displace the weights uphill.

        T = 1, or |w| + η where `adaptive`
        ε = ρ·T²·d / (‖T·d‖ + 1e-12)       one norm over all parameters that are displaced

    The radius may be set for a parameter group of the base optimizer, as its entry "rho": that
    group's part of ε is in proportion. A schedule writes the groups' entries, as torch's schedulers
    write "lr"; they are saved with the optimizer. Where "rho" is a setting of the base optimizer
    itself, such as Adadelta's decay, it is not a radius, and all groups have the transform's.

    Args:
        rho: The ascent radius ρ ≥ 0, for groups without an entry "rho"; or a function of the
            group's learning rate that returns it, such as `gk.sharpness.RhoByLR`.
        only: Which parameters are displaced; all of them step. "norm" are those of normalisation
            layers ([Mueller et al., NeurIPS 2023](https://arxiv.org/abs/2306.04226)), which takes
            `model=` in `wrap`; a function gets the parameter's name and the parameter.
        adaptive: Whether the ascent is scaled by the weights ([Kwon et al., ICML
            2021](https://arxiv.org/abs/2102.11600)): True for parameters called "weight", as in the
            authors' code, or parametrised under that name (those of at least two dimensions where
            nobody has given names); "all" for biases, too.
        eta: η ≥ 0, which keeps weights near 0 moving; with `adaptive`.
        steps: How many steps of length ρ/steps the ascent takes, each along the gradient where the
            last one has led.
        sync_perturbation: Whether ranks that train together displace their weights alike. With
            False each rank does all of the method on gradients of its own batch (m-sharpness, as in
            the authors' code of SAM, GSAM, SAGM, GAM and WSAM), and the directions are averaged:
            one exchange of a flat vector for each objective, instead of one per evaluation. State
            that is kept is averaged, too. It has no effect on one process, and is refused for
            sharded parameters.
    """

    rho: Radius = 0.05
    _: KW_ONLY
    only: Only | None = None
    adaptive: bool | Literal["all"] = False
    eta: float = 0.01
    steps: int = 1
    sync_perturbation: bool = True

    needs_rows = False

    def __post_init__(self) -> None:
        if isinstance(self.rho, Transform):  # some can be called, as functions of a radius can
            raise TypeError(
                f"rho is {self.rho!r}; transforms are not nested: pass them to gk.wrap() one after "
                "the other, the inner one first"
            )
        if not callable(self.rho):
            if isinstance(self.rho, (int, float)) and not self.rho >= 0:
                raise ValueError(f"rho is {self.rho}; the ascent radius must be at least 0")
            check_number("rho", self.rho)
        check_number("eta", self.eta, least=0)
        if self.only is not None and self.only != "norm" and not callable(self.only):
            raise ValueError(
                f"only is {self.only!r}; pass 'norm', or a function of a parameter's name and the "
                "parameter"
            )
        if self.adaptive not in (True, False, "all"):
            raise ValueError(f"adaptive is {self.adaptive!r}; pass True, False or 'all'")
        check_count("steps", self.steps)

    @property
    def per_rank(self) -> bool:
        return not self.sync_perturbation

    def __repr__(self) -> str:
        """The arguments, without the options of every ascent where they are the defaults."""
        shown = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)
            if each.repr and (each.name not in _OPTIONS or getattr(self, each.name) != each.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def around(self, inner: Oracle, context: Context) -> Oracle:
        """SAM's step: the gradients at the end of the ascent."""

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            return self.climbed(inner, at, only, context)

        return oracle

    def climbed(
        self,
        inner: Oracle,
        at: Point | None,
        only: Container[str] | None,
        context: Context,
        first: Storage | None = None,
    ) -> Gradients:
        """The gradients at the end of the ascent.

        No name holds on to earlier evaluations or points, so that their memory is free as soon as
        it is no longer needed; a caller that needs the first direction keeps that alone.

        Args:
            inner: The oracle.
            at: Where the ascent starts.
            only: The objectives to back-propagate.
            context: The step's context.
            first: The direction there (`gradients.stored()`), if it has been evaluated.
        """
        if first is None and self._plain_radius(context) == 0:
            return inner(at, only)
        if first is None and self.steps == 1:
            return inner(self.above(inner(at, only), at, context), only)
        if first is None:
            first = inner(at, only).stored()
        point: Point = context.point(at) + self.rise_along(first, at, context)
        for _ in range(self.steps - 1):
            point = self.above(inner(point, only), point, context)
        return inner(point, only)

    def above(self, gradients: Gradients, at: Point | None, context: Context) -> Displacement:
        """The end of one step of the ascent along the direction of gradients."""
        return context.point(at) + self.rise_along(gradients.stored(), at, context)

    def rise_along(
        self, vector: Float[Tensor, " P"] | Parts | Storage, at: Point | None, context: Context
    ) -> Displacement:
        """One step of the ascent along a vector, which starts at `at`."""
        moved = along = vector.vector if isinstance(vector, Storage) else vector
        if self._takes_whole:
            norm = vector.norm() if isinstance(vector, Storage) else context.norm(vector)
        else:
            moved = self._moved(along, at, context)
            norm = context.dot(along, moved).sqrt()
        found = self._radii(context)
        radii = [found[group] for group in context.layout.groups]
        factor = 1 / (self.steps * (norm + _TINY))
        return context.displaced_by_group(None, moved, radii) * factor

    @property
    def _takes_whole(self) -> bool:
        """Whether all parameters are displaced, along the direction itself."""
        return self.only is None and not self.adaptive

    def _moved(
        self, vector: Float[Tensor, " P"] | Parts, at: Point | None, context: Context
    ) -> Parts:
        """T² times the parts of a vector that are displaced; times the vector it is ‖T·d‖²."""
        layout = context.layout
        parts = layout.views(vector) if isinstance(vector, Tensor) else vector
        moved = [
            part if flag else None for part, flag in zip(parts, self._chosen(context), strict=True)
        ]
        if not self.adaptive:
            return moved
        weights = [
            weight if part is not None and self._is_scaled(context, t) else None
            for t, (weight, part) in enumerate(zip(context.weight_parts(at), moved, strict=True))
        ]
        room = layout.views(context.pool.take_vector())
        for w, d, out in in_blocks(layout, weights, parts, room):
            torch.mul(torch.abs(w).add_(self.eta).square_(), d, out=out)
        return [
            part if weight is None else new
            for part, weight, new in zip(moved, weights, room, strict=True)
        ]

    def _is_scaled(self, context: Context, t: int) -> bool:
        name = context.parameter_names[t]
        if self.adaptive == "all":
            return True
        if isinstance(name, str):
            # torch calls what makes up a parametrised weight "parametrizations.weight.original".
            _, parametrised, weight = name.rpartition("parametrizations.")
            return "weight" in (weight.partition(".")[0] if parametrised else name.split(".")[-1])
        return context.layout.parameters[t].dim() > 1

    def _radii(self, context: Context) -> list[float]:
        """The radius of each parameter group.

        Raises:
            ValueError: If one is negative or no number.
        """
        found: list[float] = []
        taken = "rho" in getattr(context.base, "defaults", ())  # the base's own setting
        for number, group in enumerate(context.base.param_groups):
            radius = self.rho if taken else group.get("rho", self.rho)
            if callable(radius):
                radius = radius(group.get("lr", 0.0))
            if radius is not self.rho and not radius >= 0:
                raise ValueError(
                    f"the ascent radius rho of parameter group {number} is {radius}; it must be at "
                    "least 0"
                )
            found.append(radius)
        return found

    def _plain_radius(self, context: Context) -> float | None:
        """The radius, if ε is a multiple of the direction; else None."""
        if not self._takes_whole:
            return None
        first, *others = self._radii(context)
        return None if any(radius != first for radius in others) else first

    def _chosen(self, context: Context) -> list[bool]:
        names, parameters = context.parameter_names, context.layout.parameters
        if self.only is None:
            return [True] * len(parameters)
        if self.only != "norm":
            choose: Callable[..., bool] = self.only
            chosen = [
                bool(choose(str(name), each)) for name, each in zip(names, parameters, strict=True)
            ]
            if not any(chosen):
                raise ValueError(_NONE_CHOSEN.format(type(self).__name__, names[0], names[-1]))
            return chosen
        if not any(owner is not None for owner in context.owners):
            raise ValueError(
                f"{self!r} displaces the parameters of normalisation layers, which it finds in the "
                "model; pass model= to gk.wrap()"
            )
        found = [is_norm(owner) for owner in context.owners]
        if not any(found):
            raise ValueError(
                f"{self!r} displaces the parameters of normalisation layers, and the optimizer has "
                "none; pass only= a function of name and parameter"
            )
        return found


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a normalisation layer, by its class or by its class's name."""
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return isinstance(module, known) or _NORM.search(type(module).__name__) is not None


def combined(
    gradients: Gradients, context: Context, *terms: tuple[Storage, Float[Tensor, ""] | float]
) -> Gradients:
    """A copy whose direction is the sum of directions, each times a factor."""
    total = Displacement(tuple((each.vector, factor) for each, factor in terms), context.layout)
    bounds = [
        each.norm() * (factor.abs() if isinstance(factor, Tensor) else abs(factor))
        for each, factor in terms
    ]
    return gradients.with_update(LazySum(total, context.pool), bound=torch.stack(bounds).sum())


def projected_out(vector: Storage, on: Storage, context: Context) -> Float[Tensor, ""]:
    """The factor with which `vector - factor * on` is orthogonal to `on`; 0 if `on` is 0."""
    square = on.norm().square()
    product = context.dot(vector.vector, on.vector)
    return torch.where(square > 0, product / square, torch.zeros_like(square))


def check_one_step(method: Ascent) -> None:
    """Check that a method whose ascent has one step only was not asked for more.

    Raises:
        ValueError: If it was.
    """
    if method.steps != 1:
        raise ValueError(f"steps is {method.steps}; the ascent of {type(method).__name__} has one")


def check_synchronised(method: Ascent, why: str) -> None:
    """Check that a method that ranks must take alike was not asked to perturb per rank.

    Raises:
        ValueError: If it was.
    """
    if not method.sync_perturbation:
        raise ValueError(
            f"sync_perturbation is False, but {why}; leave it True for {type(method).__name__}"
        )
