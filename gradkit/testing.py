"""The optimizer contract, as a check for user-defined transforms.

`check_optimizer_contract` tests what torch code expects of an optimizer, and failures at every
point of a step.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform
from gradkit.optimizer.finite_check import NonFiniteError
from gradkit.optimizer.gradient_optimizer import GradientOptimizer

MakeOptimizer = Callable[[nn.Module], GradientOptimizer]
Closures = dict[str, Callable[[], Tensor]]


def check_optimizer_contract(
    make_optimizer: MakeOptimizer, objectives: Sequence[str] = ("loss",)
) -> None:
    """Check that an optimizer keeps the optimizer contract.

    It is tested on a small network with BatchNorm and dropout, with one objective for each name.
    The state of torch's random number generator is restored.

    Asked at θ + δ, an oracle must return what it returns where the weights are θ + δ, in the same
    state and with the same random numbers; also for one of the objectives alone, unless it refuses
    that by a ValueError. This is compared in float64; all else is tested in float32. What a method
    is to compute is not checked.

    Args:
        make_optimizer: Makes the optimizer for a module. It is called several times, and must make
            equal optimizers for equal modules.
        objectives: The names of the objectives that its transforms need.

    Raises:
        AssertionError: If a part of the contract is broken; the message says which.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.testing.check_optimizer_contract(
        ...     lambda model: gk.wrap(
        ...         torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), model=model
        ...     ),
        ...     objectives=("a", "b"),
        ... )
    """
    with torch.random.fork_rng(devices=[]):
        for check in _CHECKS:
            torch.manual_seed(0)
            check(make_optimizer, tuple(objectives))


def bits(value: Any) -> Any:
    """A copy in which tensors are replaced by dtype, shape and bytes, so that `==` compares bits.

    Mappings, lists and tuples are converted recursively; other values are not changed.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.testing.bits({"w": torch.zeros(2)}) == gk.testing.bits({"w": torch.zeros(2)})
        True
        >>> gk.testing.bits(torch.tensor(0.0)) == gk.testing.bits(torch.tensor(-0.0))
        False
    """
    if isinstance(value, Tensor):
        data = value.detach().contiguous().reshape(-1)
        return (str(value.dtype), tuple(value.shape), data.view(torch.uint8).numpy().tobytes())
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


class _Problem:
    """A network, its optimizer, and objectives that reach different parts of it."""

    def __init__(
        self,
        make_optimizer: MakeOptimizer,
        names: tuple[str, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(1)
        self.names = names
        self.model = _Network().to(dtype)
        self.optimizer = make_optimizer(self.model)
        torch.manual_seed(2)

    def closures(self, changed: Callable[[Tensor], Tensor] = lambda loss: loss) -> Closures:
        """One closure per objective; each returns what `changed` makes of its loss."""

        def closure(number: int) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                scores: Tensor = self.model(_INPUT * (1 + 0.1 * number))
                return changed((scores - _TARGET.roll(number, 0)).square().mean())

            return loss

        return {name: closure(number) for number, name in enumerate(self.names)}

    def step(self, changed: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor | None:
        closures: Closures = self.closures(changed)
        return self.optimizer.step(closures)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def teachers(self) -> list[nn.Module]:
        found = [getattr(transform, "teacher", None) for transform in self.optimizer.transforms]
        return [teacher for teacher in found if isinstance(teacher, nn.Module)]

    def snapshot(self) -> dict[str, Any]:
        """Everything that a failed step must not change, in comparable form."""
        optimizer = self.optimizer
        return {
            "weights and buffers": bits(self.model.state_dict()),
            "gradients": [bits(parameter.grad) for parameter in self.model.parameters()],
            "optimizer and transform state": bits(optimizer.state_dict()),
            "learning rates": [bits(group["lr"]) for group in optimizer.param_groups],
            "teachers": [bits(teacher.state_dict()) for teacher in self.teachers()],
            "random numbers": bits(torch.get_rng_state()),
        }


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.layers = nn.Sequential(
            nn.Linear(3, 4), self.norm, nn.Tanh(), nn.Dropout(0.3), self.last
        )
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x.to(self.frozen.dtype)) * self.frozen
        return scores


_INPUT = torch.linspace(-1, 1, 24).reshape(8, 3).sin()
_TARGET = torch.linspace(1, -1, 16).reshape(8, 2)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _require_equal(before: dict[str, Any], after: dict[str, Any], when: str, why: str) -> None:
    different = [name for name in before if before[name] != after[name]]
    _require(not different, f"{', '.join(different)} differ {when}: {why}")


def _require_equal_runs(first: _Problem, second: _Problem, when: str, why: str) -> None:
    """Run both on, from the same random numbers, and compare them."""
    for each in (first, second):
        each.optimizer.zero_grad()
        torch.manual_seed(3)
        each.run(3)
    _require_equal(first.snapshot(), second.snapshot(), when, why)


_PROPOSE = (
    "change the state of a transform by context.propose, which takes effect only if the step is "
    "applied, keep what belongs to one step in local variables of `around`, and write to no weight"
)
_KEEP = (
    "keep what outlasts a step in `state` or `vectors` of a transform, and its random numbers in "
    "`generator`; other attributes are not saved"
)
_DRAW = "draw random numbers from a `generator` that each new transform seeds alike"


def _check_is_an_optimizer(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    optimizer = problem.optimizer
    _require(isinstance(optimizer, torch.optim.Optimizer), "it is no torch.optim.Optimizer")
    _require(inspect.ismethod(optimizer.step), "step is no bound method")
    _require(optimizer.param_groups is optimizer.base.param_groups, "param_groups is a copy")
    _require(optimizer.state is optimizer.base.state, "state is a copy")
    _require(optimizer.defaults is optimizer.base.defaults, "defaults is a copy")
    _require(type(optimizer.base).__name__ in repr(optimizer), "repr does not show the base")
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with torch.no_grad():
        loss = problem.step()
    _require(calls == ["pre", "post"], f"step hooks fired as {calls} in one step")
    _require(
        isinstance(loss, Tensor) and loss.dim() == 0 and not loss.requires_grad,
        "step does not return a detached 0-d tensor",
    )
    record = optimizer.last_step
    _require(record is not None and record.applied, "last_step does not say that it was applied")
    assert record is not None
    _require(set(record.names) <= set(names), f"last_step has the objectives {record.names}")
    _require(
        problem.model.unused.grad is None,
        "a parameter that no objective reached has a gradient, so that the base would decay it",
    )
    _require(bool(torch.all(problem.model.frozen == 1)), "a frozen parameter was changed")
    optimizer.zero_grad(set_to_none=True)
    _require(
        all(parameter.grad is None for parameter in problem.model.parameters()),
        "zero_grad(set_to_none=True) leaves gradients",
    )


def _check_buffers(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    if problem.optimizer.model is None:
        return  # buffers are protected where the optimizer knows the model
    problem.step()
    seen = int(problem.model.norm.num_batches_tracked or 0)
    _require(
        seen == len(names),
        f"BatchNorm counted {seen} batches in a step of {len(names)} objectives: "
        "each objective's first evaluation should count, and no other",
    )


def _check_determinism(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    first, second = _Problem(make, names), _Problem(make, names)
    _require_equal_runs(first, second, "between two runs of the same seed", _DRAW)


def _check_failures(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    """Raise at every evaluation in turn; check that the next step is not affected."""
    for error in (KeyError("from a closure"), KeyboardInterrupt()):
        untouched, disturbed = _Problem(make, names), _Problem(make, names)
        untouched.run(1)
        torch.manual_seed(2)
        disturbed.run(1)
        position = 0
        while True:
            before, random = disturbed.snapshot(), torch.get_rng_state()
            if not _raises_at(disturbed, position, error):
                break
            when = f"after {type(error).__name__} in evaluation {position + 1} of a step"
            _require_equal(before, disturbed.snapshot(), when, _PROPOSE)
            position += 1
        _require(position >= len(names), "fewer evaluations than objectives")
        # The last attempt was a complete step, so the undisturbed optimizer takes one, too.
        torch.set_rng_state(random)
        untouched.run(1)
        after = disturbed.snapshot()
        _require_equal(untouched.snapshot(), after, "in the step after failed attempts", _PROPOSE)


def _raises_at(problem: _Problem, position: int, error: BaseException) -> bool:
    calls = 0

    def counted(loss: Tensor) -> Tensor:
        nonlocal calls
        if calls == position:
            raise error
        calls += 1
        return loss

    try:
        problem.step(counted)
    except type(error) as raised:
        _require(raised is error, "an exception of a closure was replaced by another")
        return True
    return False


def _check_nonfinite(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    problem.run(1)
    nn.init.constant_(problem.model.last.bias, torch.nan)
    for mode in ("raise", "skip"):
        problem.optimizer.options.nonfinite = mode
        before = problem.snapshot()
        try:
            problem.step()
            raised = False
        except NonFiniteError as error:
            raised = True
            named = any(repr(name) in str(error) for name in names)
            _require(named, "the error does not name the objective")
        _require(raised == (mode == "raise"), f"a NaN loss with nonfinite={mode!r} was overlooked")
        after = problem.snapshot()
        if mode == "skip":
            record = problem.optimizer.last_step
            _require(
                record is not None and not record.applied,
                "last_step does not say that the step was skipped",
            )
            del before["random numbers"]  # generators advance, as after any forward pass
        _require_equal(before, after, f"after a NaN loss with nonfinite={mode!r}", _PROPOSE)


class _Probe(Transform):
    """Asks the chain inside it in its own way, once per step, and keeps the answer."""

    needs_rows = False

    def __init__(self, ask: Callable[[Oracle, Context], Gradients]) -> None:
        self._ask = ask
        self.found: Gradients | None = None

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            self.found = self._ask(inner, context)
            return self.found

        return oracle


def _probed(
    problem: _Problem, ask: Callable[[Oracle, Context], Gradients], count: int | None = None
) -> Gradients:
    """The answer of the first `count` transforms in a step in which they are asked in this way."""
    probe = _Probe(ask)
    optimizer = problem.optimizer
    optimizer.transforms = (*optimizer.transforms[:count], probe)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a rule sees a single objective
        problem.step()
    assert probe.found is not None
    return probe.found


def _name(transform: Transform) -> str:
    return type(transform).__name__


def _check_displaced_points(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    """At a displaced point an oracle gives what it gives at the weights, once they are there."""
    transforms = _Problem(make, names).optimizer.transforms
    for steps in (0, 1):
        for only in (None, *((name,) for name in names if len(names) > 1)):
            if _is_equivariant(make, names, steps, only, len(transforms)):
                continue
            counts = range(1, len(transforms) + 1)
            wrong = next(n for n in counts if not _is_equivariant(make, names, steps, only, n))
            asked = "" if only is None else f" for objective {only[0]!r} only"
            raise AssertionError(
                f"{_name(transforms[wrong - 1])}, asked{asked} at a displaced point, gives "
                "the gradients of another point: each call of `inner` must start from `at` (`inner"
                "(at, only)`, `inner(context.displaced(at, vector, factor), only)`); `at` is a "
                "displacement, not weights, and the weights there are context.weights(at)"
            )


def _is_equivariant(
    make: MakeOptimizer,
    names: tuple[str, ...],
    steps: int,
    only: tuple[str, ...] | None,
    count: int,
) -> bool:
    """Whether the first `count` transforms, after some steps, depend on the sum θ + δ alone."""
    found = []
    for moved in (False, True):
        problem = _Problem(make, names, torch.float64)
        optimizer = problem.optimizer
        with _zero_learning_rates(optimizer):
            optimizer.zero_grad()
            optimizer.step()  # initialises the transforms' vectors, at the same weights
        problem.run(steps)
        generator = torch.Generator().manual_seed(5)
        shift: dict[Tensor, Tensor] = {
            parameter: 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            for parameter in problem.model.parameters()
        }
        if moved:
            with torch.no_grad():
                for parameter, by in shift.items():
                    if parameter.requires_grad:
                        parameter.add_(by)

        def ask(
            inner: Oracle,
            context: Context,
            moved: bool = moved,
            shift: dict[Tensor, Tensor] = shift,
        ) -> Gradients:
            if moved:
                return inner(None, only)
            parts = [shift.get(parameter) for parameter in context.layout.parameters]
            return inner(context.displaced(None, parts), only)

        try:
            found.append(_probed(problem, ask, count))
        except Exception as error:
            if only is None:
                raise
            if isinstance(error, ValueError):
                return True  # a transform refuses to work on one objective
            raise AssertionError(
                f"asked for objective {only[0]!r} only, a transform fails: {error!r}; `only` may "
                "leave objectives out, so look them up in gradients.names"
            ) from error
    here, there = found
    return here.names == there.names and all(
        torch.allclose(mine, other, rtol=1e-6, atol=1e-9, equal_nan=True)
        for mine, other in zip(_values(here), _values(there), strict=True)
    )


def _values(gradients: Gradients) -> list[Tensor]:
    return [
        gradients.losses,
        gradients.weights,
        gradients.lr_scale,
        gradients.gram(),
        gradients.direction(),
    ]


def _check_parts_of_the_objectives(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    """A step that asks for objectives one by one teaches the names that any other step does."""
    kept: list[list[set[str]]] = []
    for asked in ((None,), tuple((name,) for name in names)):

        def ask(inner: Oracle, context: Context, asked: Sequence[Any] = asked) -> Gradients:
            return [inner(None, only) for only in asked][-1]

        problem = _Problem(make, names)
        transforms = problem.optimizer.transforms
        try:
            _probed(problem, ask)
        except ValueError:
            return  # a transform refuses an objective alone
        kept.append([set(_strings(list(each.state.values()))) for each in transforms])
    for transform, together, alone in zip(transforms, *kept, strict=True):
        # A rule between objectives may learn nothing of one alone, so that it knows no name then.
        lost = [name for name in names if name in together - alone and alone.intersection(names)]
        _require(
            not lost,
            f"{_name(transform)} forgets the objective {lost and lost[0]!r} in a step that asks "
            "for objectives one by one: the last proposal in a step counts, so gather what is to "
            "be remembered in a local variable of `around`, and propose all of it each time",
        )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _check_declarations(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    """`sets_update` and `needs_rows` tell the truth."""
    problem = _Problem(make, names)
    optimizer, transforms = problem.optimizer, problem.optimizer.transforms
    for count, last in enumerate(transforms, start=1):
        found = _probed(_Problem(make, names), lambda inner, context: inner(), count)
        _require(
            not found.has_update or any(each.sets_update for each in transforms[:count]),
            f"{_name(last)} sets an update without saying so: set `sets_update = True`, so that "
            "wrap() refuses rules after it, which would otherwise fail in the first step",
        )
    if len(names) > 1 and not any(each.needs_rows for each in transforms):
        closures = problem.closures()
        optimizer.options.rows = "stream"
        try:
            optimizer.step(lambda: {name: closure() for name, closure in closures.items()})
        except RuntimeError as error:
            raise AssertionError(
                f"a transform says `needs_rows = False` and reads more than direction(): {error}"
            ) from error


class _Seal(Transform):
    """Keeps copies of the gradients that pass through."""

    def __init__(self) -> None:
        self.kept: list[tuple[Gradients, list[Tensor]]] = []

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            gradients = inner(at, only)
            self.kept.append((gradients, [each.clone() for each in _tensors(gradients)]))
            return gradients

        return oracle

    def is_broken(self) -> bool:
        """Whether anyone has written to the gradients since."""
        return any(bits(_tensors(gradients)) != bits(copies) for gradients, copies in self.kept)


def _tensors(gradients: Gradients) -> list[Tensor]:
    return [gradients.losses, gradients.weights, gradients.rows, gradients.direction()]


def _check_that_gradients_are_only_read(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    optimizer = problem.optimizer
    seals = [(_Seal(), transform) for transform in optimizer.transforms]
    optimizer.transforms = tuple(each for pair in seals for each in pair)
    problem.step()
    for seal, transform in reversed(seals):
        _require(
            not seal.is_broken(),
            f"{_name(transform)} writes to gradients that it was given; they may be another's, so "
            "make a copy first: gradients.direction().clone()",
        )


def _check_zero_gradients(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    try:
        _Problem(make, names).step(lambda loss: loss.detach() + 0 * loss)
    except NonFiniteError as error:
        raise AssertionError(
            "a step on gradients that are 0 is not finite; add a small number to norms that are "
            "divided by"
        ) from error


def _check_saving(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    for steps in (0, 2):
        problem = _Problem(make, names)
        problem.run(steps)
        state = problem.optimizer.state_dict()
        _require(
            set(state) == {"state", "param_groups"},
            f"the state dict has the keys {sorted(state)}",
        )
        file = io.BytesIO()
        saved = {
            "model": problem.model.state_dict(),
            "optimizer": state,
            "teachers": [teacher.state_dict() for teacher in problem.teachers()],
        }
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        resumed = _Problem(make, names)
        resumed.run(1)  # loading must replace its own state
        resumed.model.load_state_dict(loaded["model"])
        for teacher, values in zip(resumed.teachers(), loaded["teachers"], strict=True):
            teacher.load_state_dict(values)
        resumed.optimizer.load_state_dict(state_dict=loaded["optimizer"])
        when = f"between a run saved after {steps} steps and resumed"
        _require_equal_runs(problem, resumed, when, _KEEP)


def _check_copies(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    def by_pickle(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))  # just written

    for how, duplicate in (("deepcopy", copy.deepcopy), ("pickle", by_pickle)):
        problem = _Problem(make, names)
        problem.run(1)
        twin = copy.copy(problem)
        try:
            twin.model, twin.optimizer = duplicate((problem.model, problem.optimizer))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise AssertionError(
                f"{how} fails: {error}; define transforms at the top of a module, not in a "
                "function, and keep no lambda or open file in them"
            ) from error
        _require_equal_runs(problem, twin, f"between an optimizer and its {how}", _KEEP)


def _check_learning_rates(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    optimizer = problem.optimizer
    starts = [float(group["lr"]) for group in optimizer.param_groups]
    objects = [group["lr"] for group in optimizer.param_groups]
    problem.step()
    _require(
        [float(group["lr"]) for group in optimizer.param_groups] == starts,
        "a step leaves the learning rate changed",
    )
    for group, rate in zip(optimizer.param_groups, objects, strict=True):
        if isinstance(rate, Tensor):
            _require(group["lr"] is rate, "a step replaces a learning rate that is a tensor")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for expected in (0.5, 0.25):
        problem.step()
        scheduler.step()
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            _require(
                abs(float(group["lr"]) - start * expected) <= 1e-6 * start,
                "a scheduler's learning rate does not survive a step",
            )


def _check_groups(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    problem.run(1)
    extra, model = nn.Parameter(torch.zeros(2)), problem.model
    model.register_parameter("extra", extra)
    problem.optimizer.add_param_group({"params": [extra]})
    problem.step(lambda loss: loss + (model.get_parameter("extra") - 1).square().sum())
    _require(bool((extra != 0).all()), "a parameter group that was added later is not trained")


def _check_without_closure(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    with _zero_learning_rates(problem.optimizer):
        for parameter in problem.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        before = bits(dict(problem.model.named_parameters()))
        problem.optimizer.step()
        after = bits(dict(problem.model.named_parameters()))
    _require(before == after, "a step without closure at learning rate 0 changes weights")


@contextmanager
def _zero_learning_rates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Set learning rates to 0, as distributed checkpoints do to initialise the state."""
    old = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, old, strict=True):
        group["lr"] = torch.tensor(0.0) if isinstance(rate, Tensor) else 0.0
    yield
    for group, rate in zip(optimizer.param_groups, old, strict=True):
        group["lr"] = rate


_CHECKS: tuple[Callable[[MakeOptimizer, tuple[str, ...]], None], ...] = (
    _check_is_an_optimizer,
    _check_displaced_points,
    _check_parts_of_the_objectives,
    _check_declarations,
    _check_that_gradients_are_only_read,
    _check_buffers,
    _check_determinism,
    _check_failures,
    _check_nonfinite,
    _check_zero_gradients,
    _check_saving,
    _check_copies,
    _check_learning_rates,
    _check_groups,
    _check_without_closure,
)
