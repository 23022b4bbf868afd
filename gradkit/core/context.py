"""The context of one step, as transforms see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.displacement import Displacement, Point
from gradkit.core.flat import Layout, Pool, copy_all
from gradkit.core.gradients import Gradients
from gradkit.core.gram import inner_products, product_of_parts, squared_norm
from gradkit.core.joining import join
from gradkit.core.noise import noise_by_parameter
from gradkit.core.ranks import local
from gradkit.core.samples import SampleLosses
from gradkit.core.storage import Parts

if TYPE_CHECKING:
    from gradkit.core.transform import Transform

Streams = Literal["no", "may", "must"]
"""Whether the weighted sum of the losses is back-propagated in one pass: never, where possible, or
always (an error where it is not possible)."""


@dataclass(eq=False)
class Context:
    """The context of one step, as transforms see it.

    Attributes:
        layout: Where each parameter lies in the flat vector.
        pool: Memory for flat vectors.
        base: The wrapped optimizer.
        names: The objectives of the step, in order; None until a closure that returns a mapping
            has run for the first time.
        gradients: The gradients that the step applies; set before `after_step` is called.
        gate: Set by a gated transform: 1 aligned, 0 conflict.
        gate_cosine: Set by a gated transform: the cosine that its gate depends on.
        gate_rate: Set by a gated transform: the share of aligned steps so far.
        decay: Set by a teacher: the decay it used.
        model: The module that `wrap` was given as `model=`.
        streams: Whether the weighted sum of the losses may be back-propagated in one pass.
        by_tensor: Whether a transform needs inner products per parameter tensor; those over all
            parameters are then their sum.
        without_loss: The objectives whose closure called backward and returned no loss.
        ascended: The positions, in the layout, of parameters in groups with `maximize`. Their
            gradients are negated as soon as they are known, so that transforms always see a
            minimisation. If all parameters are in such groups, the losses are negated, too.
        parameter_names: Each parameter's name in the model or the base optimizer, or else its
            position.
        committed: Whether the base optimizer has stepped, and what was proposed is the state.
        samples: What is made of per-sample losses; None where objectives return one number.
        owners: The module that holds each parameter; None where `wrap` was given no `model=`.
    """

    layout: Layout
    pool: Pool
    base: torch.optim.Optimizer
    names: tuple[str, ...] | None = None
    gradients: Gradients | None = None
    gate: Float[Tensor, ""] | None = None
    gate_cosine: Float[Tensor, ""] | None = None
    gate_rate: Float[Tensor, ""] | None = None
    decay: Float[Tensor, ""] | None = None
    model: nn.Module | None = None
    streams: Streams = "no"
    by_tensor: bool = False
    without_loss: set[str] = field(default_factory=set)
    ascended: tuple[int, ...] = ()
    parameter_names: tuple[str | int, ...] = ()
    owners: tuple[nn.Module | None, ...] = ()
    samples: SampleLosses | None = None
    _proposals: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)
    _vectors: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    committed: bool = field(default=False, repr=False)

    @property
    def ascends_everywhere(self) -> bool:
        """Whether all parameters are in groups with `maximize`."""
        return len(self.ascended) == len(self.layout.parameters) and bool(self.ascended)

    # Points, vectors and settings.

    def weights(self, at: Point | None = None) -> Float[Tensor, " P"]:
        """The weights plus `at`, as a new flat vector."""
        result = self.pool.take_vector()
        values = self.layout.local_parameters()
        Displacement.of(at, self.layout).add_to(values, self.layout.views(result))
        return result

    def weight_parts(self, at: Point | None = None) -> Parts:
        """The weights plus `at`, one tensor per parameter; only read.

        Without a displacement they are the weights themselves, and not copied.
        """
        point = self.point(at)
        if not point.terms:
            return self.layout.local_parameters()
        return self.layout.views(self.weights(point))

    def set_weights(self, weights: Float[Tensor, " P"]) -> None:
        """Write the weights, in `after_step`.

        Args:
            weights: A flat vector, of this rank's part where parameters are sharded.

        Raises:
            RuntimeError: If the base optimizer has not stepped yet.
            ValueError: If the vector has another length than the weights.
        """
        self._check_stepped()
        if weights.shape != (self.layout.numel,):
            raise ValueError(
                f"the weights to be written have shape {tuple(weights.shape)}; pass a flat vector "
                f"of shape {(self.layout.numel,)}"
            )
        with torch.no_grad():
            copy_all(self.layout.local_parameters(), self.layout.views(weights))

    def move_weights(self, by: Displacement) -> None:
        """Add a displacement to the weights, in `after_step`.

        Raises:
            RuntimeError: If the base optimizer has not stepped yet.
        """
        self._check_stepped()
        values = self.layout.local_parameters()
        with torch.no_grad():
            by.add_to(values, values)

    def _check_stepped(self) -> None:
        if self.gradients is None:
            raise RuntimeError(
                "the weights can be written in after_step() only, once the base optimizer has "
                "stepped; to evaluate at other weights, call the oracle at a displacement"
            )

    def displaced(
        self,
        at: Point | None,
        vector: Float[Tensor, " P"] | Parts,
        factor: Float[Tensor, ""] | float = 1.0,
    ) -> Displacement:
        """The point `at + factor * vector`, for an oracle.

        Args:
            at: The point to start from; None for the weights themselves.
            vector: A flat vector, or one tensor per parameter. It is only read; do not write to it
                before the oracle has been called.
            factor: The factor of the vector.
        """
        return Displacement.of(at, self.layout).plus(vector, factor)

    def displaced_by_group(
        self,
        at: Point | None,
        vector: Float[Tensor, " P"] | Parts,
        factors: Sequence[Float[Tensor, ""] | float],
    ) -> Displacement:
        """The point `at` plus a vector with a factor for each parameter.

        Args:
            at: The point to start from; None for the weights themselves.
            vector: A flat vector, or one tensor per parameter. It is only read.
            factors: One factor per parameter, as from `group_values`.
        """
        keys = [id(each) if isinstance(each, Tensor) else each for each in factors]
        distinct = dict(zip(keys, factors, strict=True))
        point = self.point(at)
        if len(distinct) == 1:
            return point.plus(vector, *distinct.values())
        parts = self._views(vector)
        for key, factor in distinct.items():
            own = [part if k == key else None for part, k in zip(parts, keys, strict=True)]
            point = point.plus(own, factor)
        return point

    def point(self, at: Point | None) -> Displacement:
        """A point in any of the forms in which an oracle is given one; it adds up and scales."""
        return Displacement.of(at, self.layout)

    def sum_of(
        self, *terms: tuple[Float[Tensor, " P"] | Parts, Float[Tensor, ""] | float]
    ) -> Float[Tensor, " P"]:
        """The sum of vectors, each times a factor, as a new flat vector.

        Args:
            terms: Vectors, flat or one tensor per parameter, and their factors; only read.
        """
        return Displacement(terms, self.layout).flat(self.pool.take_vector())

    def join(self, sources: Mapping[str, Gradients], last: Gradients) -> Gradients:
        """Gradients whose rows come from several evaluations, in the objectives' order.

        Args:
            sources: For each objective, the evaluation that its row is taken from.
            last: The evaluation whose factor of the learning rate is kept.

        Raises:
            ValueError: If one of the evaluations has an `update`, which belongs to one point only.
        """
        return join(sources, self.names or tuple(sources), self.pool, last)

    def norm(self, vector: Float[Tensor, " P"] | Parts) -> Float[Tensor, ""]:
        """The Euclidean norm of a vector, summed over the ranks that hold parts; in float64."""
        return self.dot(vector, vector).sqrt()

    def dot(
        self, a: Float[Tensor, " P"] | Parts, b: Float[Tensor, " P"] | Parts
    ) -> Float[Tensor, ""]:
        """The inner product of two vectors, summed over the ranks that hold parts; in float64."""
        found = self._dot_of_parts(a, b)
        if found is not None:
            return found if self.layout.shards is None else self.layout.shards.add_up(found)
        rows = [self._flat(vector)[None] for vector in ((a,) if a is b else (a, b))]
        return inner_products(rows[0], rows[-1], over=self.layout.shards)[0, 0]

    def _dot_of_parts(
        self, a: Float[Tensor, " P"] | Parts, b: Float[Tensor, " P"] | Parts
    ) -> Float[Tensor, ""] | None:
        """This rank's inner product where parts need not be copied to a flat vector, else None."""
        on_cpu = self.layout.device.type == "cpu"
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return None
        if not on_cpu and not (a is b and self.layout.device.type == "cuda"):
            return None
        pairs = [
            (u, v)
            for u, v in zip(self._views(a), self._views(b), strict=True)
            if u is not None and v is not None
        ]
        if a is b:
            return squared_norm([u for u, _ in pairs])
        return product_of_parts([u for u, _ in pairs], [v for _, v in pairs])

    def _views(self, vector: Float[Tensor, " P"] | Parts) -> Parts:
        return self.layout.views(vector) if isinstance(vector, Tensor) else vector

    def _flat(self, vector: Float[Tensor, " P"] | Parts) -> Float[Tensor, " P"]:
        if isinstance(vector, Tensor):
            return vector
        return Displacement(((vector, 1.0),), self.layout).flat(self.pool.take_vector())

    def noise(
        self, generator: torch.Generator, kind: Literal["uniform", "normal"] = "normal"
    ) -> Float[Tensor, " P"]:
        """A flat vector of random numbers, which do not depend on sharding or memory layout.

        Args:
            generator: A generator on the CPU; one number is drawn from it.
            kind: "normal" of mean 0 and variance 1, or "uniform" on [0, 1).
        """
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        draw = noise_by_parameter(kind, seed, self.layout)
        result = self.pool.take_vector()
        for t, (start, stop) in enumerate(self.layout.segments("tensor")):
            draw(t, result[start:stop])
        return result

    def group_values(self, name: str, default: Any) -> tuple[Any, ...]:
        """A setting of each parameter's group in the base optimizer.

        There is one value per parameter of the layout, so that
        `zip(context.layout.views(vector), context.group_values("rho", 0.05))` pairs them.

        Args:
            name: The key in the parameter group.
            default: The value for groups that do not have this key.
        """
        values = [group.get(name, default) for group in self.base.param_groups]
        return tuple(values[group] for group in self.layout.groups)

    def base_state(self, key: str) -> Parts:
        """The base optimizer's state of each parameter under a key, such as "momentum_buffer".

        There is one tensor per parameter, this rank's part of it; None where there is none.
        """
        held = [self.base.state.get(each) or {} for each in self.layout.parameters]
        found = [state.get(key) for state in held]
        return [local(each) if isinstance(each, Tensor) else None for each in found]

    @contextmanager
    def sampling(self, samples: SampleLosses) -> Iterator[None]:
        """A context, around calls of an oracle, in which objectives may return per-sample losses.

        Args:
            samples: What is made of them; it is asked once for each objective and micro-batch.
        """
        outer, self.samples = self.samples, samples
        try:
            yield
        finally:
            self.samples = outer

    # State that is kept from step to step.

    def propose(self, transform: Transform, **state: Any) -> None:
        """Propose new state for `transform`; it takes effect if the step is applied.

        Of several proposals in one step the last one counts. In `after_step`, it takes effect at
        once. A vector may also be proposed as a displacement, which is computed when it takes
        effect, in the memory of the state (at once, if it is made of other vectors of the state,
        which may have changed by then). So its terms may not be what the step applies, since some
        base optimizers write to that.

        Raises:
            TypeError: If a value is neither a number, a string, a tensor nor a list of these.
            ValueError: If a vector's shape differs from that of the vector it replaces, or if a
                tensor is too large for state that is saved as text, or is a flat vector under a
                name that neither `state` nor `vectors` has.
        """
        for name, value in state.items():
            if name not in transform.vectors:
                value = checked_state(transform, name, value)
                _check_small(transform, name, value, self.layout.numel, len(self.names or ()))
            kept = transform.vectors.get(name)
            if isinstance(value, Displacement):
                if value.needs_now(name, transform.vectors):
                    state[name] = value.flat()
            elif kept is not None and value.shape != kept.shape:
                raise ValueError(
                    f"{type(transform).__name__} proposed a vector {name!r} of shape "
                    f"{tuple(value.shape)}; it has shape {tuple(kept.shape)}"
                )
        self._proposals.setdefault(id(transform), {}).update(state)
        if self.committed:
            self._commit(transform)

    def propose_vectors(self, transform: Transform, **vectors: Float[Tensor, " P"]) -> None:
        """Propose flat vectors for `transform`, also under new names.

        They are copied when the step is applied. If only a step shows which vectors a transform
        keeps, record their names in its state, which is loaded first, and let `initial_vectors`
        make the vectors from these names.
        """
        self._vectors.setdefault(id(transform), {}).update(vectors)
        if self.committed:
            self._commit(transform)

    def proposed(self, transform: Transform) -> dict[str, Any]:
        """The state that has been proposed for `transform` in this step so far."""
        return dict(self._proposals.get(id(transform), {}))

    def commit(self, transforms: Sequence[Transform]) -> None:
        """Make what was proposed for transforms, and for those inside them, their state."""
        self.committed = True
        for transform in transforms:
            self._commit(transform)
            self.commit(transform.inside)

    def _commit(self, transform: Transform) -> None:
        for name, value in self._proposals.pop(id(transform), {}).items():
            held = transform.vectors if name in transform.vectors else transform.state
            held[name] = value
        for name, vector in self._vectors.pop(id(transform), {}).items():
            known = name in transform.vectors
            transform.vectors[name] = vector if known else vector.clone()

    def average_proposals(
        self, mean: Callable[[Tensor], Tensor], before: Mapping[tuple[int, str], object]
    ) -> None:
        """Replace proposed tensors by their means over the ranks.

        Args:
            mean: The mean of a tensor over the ranks.
            before: What `proposals` returned before; unchanged proposals are left alone.
        """
        for held in (self._proposals, self._vectors):
            for key, proposed in held.items():
                for name, value in proposed.items():
                    if value is before.get((key, name)):
                        continue
                    if isinstance(value, Displacement):
                        proposed[name] = mean(value.flat())
                    elif isinstance(value, Tensor) and value.is_floating_point():
                        proposed[name] = mean(value)

    def proposals(self) -> dict[tuple[int, str], object]:
        """All that has been proposed in this step so far."""
        return {
            (key, name): value
            for held in (self._proposals, self._vectors)
            for key, proposed in held.items()
            for name, value in proposed.items()
        }

    def require_losses(self, who: Transform, names: Sequence[str]) -> None:
        """Check that the losses of these objectives are known.

        Raises:
            ValueError: If one of them is not known.
        """
        missing = [name for name in names if name in self.without_loss]
        if missing:
            raise ValueError(
                f"{who!r} works on losses, and that of objective {missing[0]!r} is not known: its "
                "closure called backward and returned None, or there was none; return the loss"
            )

    def require(self, who: Transform, *names: str) -> None:
        """Check that the step has these objectives.

        Raises:
            TypeError: If `who` is left out.
            ValueError: If one of them is missing.
        """
        who_given: object = who
        if isinstance(who_given, str):
            raise TypeError(
                f"require() takes the transform that asks first, not {who_given!r}; write "
                f"context.require(self, {who_given!r})"
            )
        if self.names is None:
            return
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(
                f"{type(who).__name__} needs the objective {missing[0]!r}, but the step has "
                f"{', '.join(map(repr, self.names))}; pass step() a mapping of named objectives"
            )


def checked_state(transform: Transform, name: str, value: Any) -> Any:
    """A value of a transform's state, if it can be saved.

    Raises:
        TypeError: If it is neither a number, a string, a tensor nor a list of these.
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            checked_state(transform, name, item)
    elif value is not None and not isinstance(value, (bool, int, float, str, Tensor)):
        keyed = "; keep a dict as two lists, of its keys and of its values"
        raise TypeError(
            f"the state {name!r} of {type(transform).__name__} holds a {type(value).__name__}, "
            "which cannot be saved; it may hold numbers, strings, tensors and lists of them"
            f"{keyed if isinstance(value, Mapping) else ''}"
        )
    return value


def _check_small(
    transform: Transform, name: str, value: object, numel: int, objectives: int
) -> None:
    if not isinstance(value, Tensor):
        return
    # A toy may have as many weights as objectives.
    known = numel == objectives or (name in transform.state and numel <= 1 << 12)
    is_flat = value.shape == (numel,) and not known
    if is_flat or value.numel() * value.element_size() > 1 << 22:
        raise ValueError(
            f"{type(transform).__name__} proposed a tensor {name!r} of shape "
            f"{tuple(value.shape)} as small state, which is saved as text; return a vector of the "
            "length of the weights from initial_vectors(), or pass it to context.propose_vectors()"
        )
