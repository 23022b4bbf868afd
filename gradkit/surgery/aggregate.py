"""Other libraries' aggregators and the user's own functions as rules."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import combine, scaled
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Scope
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule, Rule, check_is_global
from gradkit.surgery.weighing import active_rows


@dataclass(eq=False)
class Aggregate(Rule):
    """Any function of gradients as a rule, [TorchJD](https://torchjd.org)'s aggregators included.

        of rows     d = function(J)            [K, P] -> [P]
        of gram     d = function(J·Jᵀ)ᵀ·J      [K, K] -> [K]

    A function of the Gram matrix needs no copy of the gradients, works with sharded parameters, and
    other rules can follow it. A function of the rows gets a copy of them, to which it may write. It
    sets the update, so no rule can follow. Either function is called once per evaluation and block,
    on the rows of nonzero weight; its errors are not caught. A Gram matrix is passed in the
    gradients' dtype (float32 for narrower ones), as if the function had computed it, but without
    the rounding errors of that dtype.

    State that the function keeps from call to call is not saved with the optimizer and not restored
    when a step fails. A transform that displaces, such as SAM, advances it with every evaluation.
    The same holds for random numbers from torch's global generator; on several ranks it must draw
    the same numbers on each (seed them equally), or weights drift apart. gradkit's own rules have
    none of these limits.

    Homogeneity: the function's. Cost: none beyond the gradients and the function. Memory: for rows,
    a copy of them (K·P elements, or the largest block's with another scope; with "shared", twice
    the shared columns for a moment if they are not one range) and one flat vector. State: none.

    Args:
        function: The function.
        of: The argument of the function, "rows" or "gram". "auto" is "gram" for TorchJD's
            GramianWeightedAggregator and its weightings, and "rows" for everything else.
        scope: The parameters of one call: "global", all parameters; each "group"; each "tensor"; or
            "shared", those that objectives share.

    Raises:
        TypeError: If `function` is a class or cannot be called.
        ValueError: If `of` or `scope` has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.Aggregate(lambda rows: rows.median(0).values)(jacobian)
        tensor([-4.,  1.,  1.])
        >>> gk.Aggregate(lambda gram: 1 / gram.diagonal().sqrt(), of="gram")(jacobian)
        tensor([0.0305, 0.3979, 0.3979])
    """

    function: Callable[[Tensor], Tensor]
    of: Literal["auto", "rows", "gram"] = "auto"
    scope: Scope = "global"

    degree = None

    def __post_init__(self) -> None:
        if self.of not in ("auto", "rows", "gram"):
            raise ValueError(f"of is {self.of!r}; choose 'auto', 'rows' or 'gram'")
        if isinstance(self.function, type):
            name = self.function.__name__
            raise TypeError(f"function is the class {name}; pass an object, {name}(...)")
        if not callable(self.function):
            raise TypeError(f"function is {self.function!r}; pass something that can be called")

    @property
    def works_on(self) -> Literal["rows", "gram"]:
        """The argument of the function: "rows" or "gram"."""
        if self.of != "auto":
            return self.of
        return "rows" if _gramian_weighting(self.function) is None else "gram"

    @property
    def sets_update(self) -> bool:
        """Whether the result is not a weighted sum of whole gradients."""
        return self.works_on == "rows" or self.scope != "global"

    def weights(self, gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K"]:
        """The weights that the function returns for these Gram matrices.

        Args:
            gram: Gram matrices of the gradients.

        Raises:
            TypeError: If the function does not return a tensor.
            ValueError: If it is not a function of Gram matrices, or if its result does not have the
                shape of weights.
        """
        if self.works_on == "rows":
            raise ValueError(
                f"{self!r} is a function of the gradients themselves; call it on them, or pass "
                "of='gram' if it takes Gram matrices"
            )
        return self._weighting(gram.dtype).weights(gram)

    def __call__(self, jacobian: Float[Tensor, "K P"]) -> Float[Tensor, " P"]:
        if self.works_on == "gram":
            return self._weighting(jacobian.dtype)(jacobian)
        check_is_global(self, self.scope)
        return self._result(self.function, jacobian.detach().clone(), "rows")

    def around(self, inner: Oracle, context: Context) -> Oracle:
        if self.works_on == "gram":
            return self._weighting(context.layout.dtype).around(inner, context)
        if context.layout.shards is not None:
            raise ValueError(
                f"{self!r} is a function of whole gradients, and parameters are sharded: it would "
                "see this rank's part only; use a rule that works on Gram matrices (of='gram' if "
                "this is one), or DistributedDataParallel in place of fully_shard"
            )

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            return self._merged(inner(at, only), context)

        return oracle

    def _merged(self, gradients: Gradients, context: Context) -> Gradients:
        active = list(active_rows(self, gradients))
        if not active:
            return gradients
        update, seen = context.pool.take_vector(), None
        if self.scope == "shared":
            shared = gradients.shared(active)
            for start, stop in shared.others:
                part = gradients.rows[:, start:stop]
                combine(part, gradients.weights, active, update[start:stop])
            active, blocks = list(shared.rows), [shared.spans] if shared.spans else []
            seen = shared.gram if shared.rows else None
        else:
            blocks = [((start, stop),) for start, stop in gradients.segments(self.scope)]
        for spans in blocks:
            columns = [gradients.rows[active, start:stop] for start, stop in spans]
            rows = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
            del columns
            if rows.numel() == 0:
                continue
            if not gradients.has_unit_weights:
                for row, weight in zip(rows, gradients.weights[active], strict=True):
                    scaled(row, weight, row)
            direction = self._result(self.function, rows, "rows")
            pieces = torch.split(direction, [stop - start for start, stop in spans])
            for (start, stop), piece in zip(spans, pieces, strict=True):
                update[start:stop] = piece
        return gradients.replace(update=update, seen_gram=seen)

    def _weighting(self, dtype: torch.dtype) -> _Weighting:
        return _Weighting(self, torch.promote_types(dtype, torch.float32))

    def _result(
        self, function: Callable[[Tensor], Any], matrix: Float[Tensor, "K n"], kind: str
    ) -> Float[Tensor, " n"]:
        """The function's result, in the dtype and on the device of the matrix.

        Raises:
            TypeError: If it is not a tensor.
            ValueError: If it does not have the shape of a row of the matrix, or is complex.
        """
        # With autograd enabled, as in a script that calls the function on gradients.
        with torch.enable_grad():
            result = function(matrix)
        like, what = matrix[0], f"{kind} of shape {list(matrix.shape)}"
        name = getattr(self.function, "__qualname__", repr(self.function))
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{name} returned a {type(result).__name__} for {what}; it must return a tensor of "
                f"shape {list(like.shape)}"
            )
        if result.shape != like.shape or result.is_complex():
            hint = ""
            if self.works_on == "rows" and result.dim() == 1:
                hint = "; if it gives weights for Gram matrices, pass of='gram'"
            raise ValueError(
                f"{name} returned a tensor of shape {list(result.shape)} and {result.dtype} for "
                f"{what}; it must return real numbers of shape {list(like.shape)}{hint}"
            )
        return result.detach().to(like)


class _Weighting(GramRule):
    """An `Aggregate` whose function takes Gram matrices."""

    degree = None
    needs_symmetry = False  # some functions also accept J₁·J₂ᵀ

    def __init__(self, owner: Aggregate, dtype: torch.dtype) -> None:
        self.scope = owner.scope
        self._aggregate = owner
        self._dtype = dtype

    def __repr__(self) -> str:
        return repr(self._aggregate)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram, owner = inputs.gram, self._aggregate
        inner = _gramian_weighting(owner.function)
        function = owner.function if inner is None else inner
        matrices = gram.to(self._dtype).reshape(-1, *gram.shape[-2:])
        weights = [owner._result(function, each.clone(), "a Gram matrix") for each in matrices]
        return torch.stack(weights).reshape(gram.shape[:-1]).to(gram), memory


def _gramian_weighting(function: object) -> Any:
    """The part of a TorchJD object that maps Gram matrices to weights; None for other objects."""
    inner = getattr(function, "gramian_weighting", None)
    if inner is not None:
        return inner
    # By name, since TorchJD is not needed otherwise.
    names = [each.__name__ for each in type(function).__mro__]
    if names[0] == "CRMOGMWeighting":  # accepts what the weighting inside it accepts
        inside = getattr(function, "weighting", None)
        return None if _gramian_weighting(inside) is None else function
    known = ("_GramianWeighting", "MoDoWeighting", "SDMGradWeighting")
    return function if any(name in known for name in names) else None
