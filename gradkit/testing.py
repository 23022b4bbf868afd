"""The optimizer contract, as a check for user-defined transforms.

`check_optimizer_contract` tests what torch code expects of an optimizer, and failures at every
point of a step.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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

    def __init__(self, make_optimizer: MakeOptimizer, names: tuple[str, ...]) -> None:
        torch.manual_seed(1)
        self.names = names
        self.model = _Network()
        self.optimizer = make_optimizer(self.model)
        torch.manual_seed(2)

    def closures(self, on_call: Callable[[], None] = lambda: None) -> Closures:
        """One closure per objective; each calls `on_call` once it has run the network."""

        def closure(number: int) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                scores: Tensor = self.model(_INPUT * (1 + 0.1 * number))
                on_call()
                return (scores - _TARGET.roll(number, 0)).square().mean()

            return loss

        return {name: closure(number) for number, name in enumerate(self.names)}

    def step(self, on_call: Callable[[], None] = lambda: None) -> Tensor | None:
        closures: Closures = self.closures(on_call)
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
        scores: Tensor = self.layers(x) * self.frozen
        return scores


_INPUT = torch.linspace(-1, 1, 24).reshape(8, 3).sin()
_TARGET = torch.linspace(1, -1, 16).reshape(8, 2)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _require_equal(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    different = [name for name in before if before[name] != after[name]]
    _require(not different, f"{', '.join(different)} differ {when}")


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
    torch.manual_seed(2)
    first.run(3)
    torch.manual_seed(2)
    second.run(3)
    _require_equal(first.snapshot(), second.snapshot(), "between two runs of the same seed")


def _check_failures(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    """Raise at every evaluation in turn; check that the next step is not affected."""
    for error in (KeyError("from a closure"), KeyboardInterrupt()):
        untouched, disturbed = _Problem(make, names), _Problem(make, names)
        untouched.run(1)
        torch.manual_seed(2)
        disturbed.run(1)
        position = 0
        while True:
            before = disturbed.snapshot()
            if not _raises_at(disturbed, position, error):
                break
            when = f"after {type(error).__name__} in evaluation {position + 1} of a step"
            _require_equal(before, disturbed.snapshot(), when)
            position += 1
        _require(position >= len(names), "fewer evaluations than objectives")
        # The last attempt was a complete step, so the undisturbed optimizer takes one, too.
        torch.set_rng_state(_rng(before))
        untouched.run(1)
        _require_equal(
            untouched.snapshot(), disturbed.snapshot(), "in the step after failed attempts"
        )


def _raises_at(problem: _Problem, position: int, error: BaseException) -> bool:
    calls = 0

    def on_call() -> None:
        nonlocal calls
        if calls == position:
            raise error
        calls += 1

    try:
        problem.step(on_call)
    except type(error) as raised:
        _require(raised is error, "an exception of a closure was replaced by another")
        return True
    return False


def _rng(snapshot: dict[str, Any]) -> Tensor:
    _, shape, data = snapshot["random numbers"]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)


def _check_nonfinite(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    problem.run(1)
    with torch.no_grad():
        weight = problem.model.last.bias
        weight.fill_(torch.nan)
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
        _require_equal(before, after, f"after a NaN loss with nonfinite={mode!r}")


def _check_zero_gradients(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    problem = _Problem(make, names)
    closures = {name: functools.partial(_flat, each) for name, each in problem.closures().items()}
    try:
        problem.optimizer.step(closures)
    except NonFiniteError as error:
        raise AssertionError(
            "a step on gradients that are 0 is not finite; add a small number to norms that are "
            "divided by"
        ) from error


def _flat(closure: Callable[[], Tensor]) -> Tensor:
    """The loss, with a gradient of 0."""
    loss = closure()
    return loss.detach() + 0 * loss


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
        for each in (problem, resumed):
            each.optimizer.zero_grad()
            torch.manual_seed(3)
            each.run(2)
        _require_equal(
            problem.snapshot(), resumed.snapshot(), f"between a run saved after {steps} and resumed"
        )


def _check_copies(make: MakeOptimizer, names: tuple[str, ...]) -> None:
    def by_pickle(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))  # just written

    for how, duplicate in (("deepcopy", copy.deepcopy), ("pickle", by_pickle)):
        problem = _Problem(make, names)
        problem.run(1)
        twin = copy.copy(problem)
        twin.model, twin.optimizer = duplicate((problem.model, problem.optimizer))
        for each in (problem, twin):
            each.optimizer.zero_grad()
            torch.manual_seed(3)
            each.run(2)
        _require_equal(problem.snapshot(), twin.snapshot(), f"between an optimizer and its {how}")


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
    extra = nn.Parameter(torch.zeros(2))
    problem.model.register_parameter("extra", extra)
    problem.optimizer.add_param_group({"params": [extra]})
    closures = {
        name: functools.partial(_with_extra, problem.model, closure)
        for name, closure in problem.closures().items()
    }
    problem.optimizer.step(closures)
    _require(bool((extra != 0).all()), "a parameter group that was added later is not trained")


def _with_extra(model: nn.Module, closure: Callable[[], Tensor]) -> Tensor:
    return closure() + (model.get_parameter("extra") - 1).square().sum()


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
