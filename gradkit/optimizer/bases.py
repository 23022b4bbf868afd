"""Which optimizers can be a base: those that step on the gradients in `.grad` and nothing else."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam

# Methods of optimizers that call backward, or move the weights to evaluate, by themselves.
_OWN_BACKWARD = ("backward", "fused_backward")
_OWN_POINTS = (("first_step", "second_step"), ("perturb_weights", "un_perturb"))


def check_base(base: Optimizer) -> None:
    """Check that an optimizer steps on the plain gradients in `.grad`.

    The class is inspected: its name and methods, the signature of `step` and, if the source is
    available, whether `step` raises without a closure or computes with the loss.

    Raises:
        ValueError: If the optimizer needs more than gradients.
    """
    name = type(base).__name__
    problem = _problem(base)
    if problem is not None:
        raise ValueError(f"base is of the class {name}, which {problem}")
    for number, group in enumerate(base.param_groups):
        check_group(group, number, base)


def _problem(base: Optimizer) -> str | None:
    mro = {each.__name__ for each in type(base).__mro__}
    if _decides_itself(base):
        return (
            "a trainer has made, to scale losses or to pass over steps while it accumulates; wrap "
            "the optimizer itself, and hand the result to the trainer"
        )
    if isinstance(base, LBFGS):
        return (
            "evaluates the loss several times inside its own step, which transforms cannot see; "
            "wrap a first-order optimizer such as SGD or Adam"
        )
    if isinstance(base, SparseAdam):
        return "takes sparse gradients only, and flat vectors are dense; wrap Adam"
    if "DPOptimizer" in mro:
        return (
            "makes its own gradient from those of single samples, in place of any that a "
            "transform has made; train without gradkit where privacy is accounted for"
        )
    if any(callable(getattr(base, method, None)) for method in _OWN_BACKWARD):
        return (
            "calls backward itself, to scale losses or to step meanwhile; wrap the optimizer "
            "inside it, or a plain one, and pass a GradScaler as scaler="
        )
    if any(all(hasattr(base, method) for method in methods) for methods in _OWN_POINTS):
        return (
            "evaluates the loss at other weights inside its own step, which transforms cannot "
            "see; wrap the optimizer inside it, and pass gk.SAM() or a relative as a transform"
        )
    step = inspect.unwrap(type(base).step)
    if step is inspect.unwrap(Optimizer.step):
        return "has no step of its own; wrap an optimizer that steps on what .grad holds"
    if getattr(base, "is_second_order", False) or _takes_hessian(base, step):
        return (
            "differentiates gradients again to estimate the Hessian, and transforms leave "
            "gradients without a graph; wrap a first-order optimizer"
        )
    reason = _needs_closure(step)
    if reason is not None:
        return (
            f"{reason}, and a base gets none: losses are evaluated before, by gradkit; wrap an "
            "optimizer that steps on what .grad holds"
        )
    groups = getattr(base, "param_groups", None)
    if not groups or groups[0] is not base.param_groups[0]:
        return (
            "has no param_groups that could be written to, as torch's optimizers do; wrap the "
            "optimizer inside it"
        )
    return None


def check_group(group: Mapping[str, Any], number: int, base: Optimizer) -> None:
    """Check that a parameter group does not need a differentiable step.

    Raises:
        ValueError: If it has `differentiable=True`.
    """
    # torch reads the defaults to decide whether a graph is recorded at all.
    everywhere = getattr(base, "defaults", {}).get("differentiable", False)
    if group.get("differentiable", False) or everywhere:
        raise ValueError(
            f"parameter group {number} of the {type(base).__name__} has differentiable=True, but "
            "transforms leave gradients without a graph, so that nothing could be differentiated "
            "through the step; pass differentiable=False, and use torch.func for meta-learning"
        )


def _decides_itself(base: Optimizer) -> bool:
    """Whether a trainer's optimizer scales losses, or steps only when it has accumulated."""
    if "AcceleratedOptimizer" in {each.__name__ for each in type(base).__mro__}:
        accumulated = getattr(getattr(base, "gradient_state", None), "num_steps", 1)
        return getattr(base, "scaler", None) is not None or accumulated > 1
    strategy = getattr(base, "_strategy", None)  # Lightning's, and Fabric's
    precisions = [getattr(strategy, name, None) for name in ("precision_plugin", "precision")]
    return any(getattr(precision, "scaler", None) is not None for precision in precisions)


def _takes_hessian(base: Optimizer, step: Callable[..., Any]) -> bool:
    groups = getattr(base, "param_groups", None) or [{}]
    return "hessian" in inspect.signature(step).parameters or "hessian_power" in groups[0]


@functools.lru_cache(maxsize=256)  # reading the source takes milliseconds
def _needs_closure(step: Callable[..., Any]) -> str | None:
    """Why `step` needs a closure: no default, an error without one, or a use of its loss."""
    arguments = list(inspect.signature(step).parameters.values())[1:]
    named = [each for each in arguments if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if any(each.default is each.empty for each in named):
        return "cannot step without a closure"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step)))
    except (OSError, SyntaxError, TypeError):  # no source, or part of a larger expression
        return None
    if any(_refuses_none(each) for each in getattr(tree.body[0], "body", [])):
        return "cannot step without a closure"
    if _losses(tree) & _operands(tree):
        return "lets the loss that its closure returns decide on the step"
    return None


def _refuses_none(statement: ast.AST) -> bool:
    """Whether a statement is `if closure is None: raise ...` or `assert closure is not None`."""
    if isinstance(statement, ast.If):
        missing = {"closure is None", "not closure"}
        raises = any(isinstance(each, ast.Raise) for each in statement.body)
        return raises and ast.unparse(statement.test) in missing
    present = {"closure is not None", "closure", "callable(closure)"}
    return isinstance(statement, ast.Assert) and ast.unparse(statement.test) in present


def _losses(tree: ast.AST) -> set[str]:
    """The variables that `closure()` is assigned to."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    found = [node for node in assigned if "closure()" in ast.unparse(node.value)]
    return {target.id for node in found for target in node.targets if isinstance(target, ast.Name)}


def _operands(tree: ast.AST) -> set[str]:
    """The variables that are arguments of calls or of arithmetic, except in `return` statements."""
    operands: list[ast.AST] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Return):
            continue
        if isinstance(node, ast.Call):
            operands += [*node.args, *(each.value for each in node.keywords)]
        elif isinstance(node, ast.BinOp):
            operands += [node.left, node.right]
        pending.extend(ast.iter_child_nodes(node))
    return {each.id for each in operands if isinstance(each, ast.Name)}


def inner_optimizers(base: Optimizer) -> list[Optimizer]:
    """The optimizers that an optimizer holds as attributes."""
    return [each for each in vars(base).values() if isinstance(each, Optimizer)]


@contextmanager
def sharing_kept(base: Optimizer) -> Iterator[None]:
    """Keep the groups and state that a base shares with the optimizer inside it.

    Loading replaces the lists and dicts of the inner optimizer. A base that has the same objects as
    attributes would keep the old ones, and would not see learning rates change.
    """
    shared = [
        (inner, key)
        for inner in inner_optimizers(base)
        for key in ("param_groups", "state")
        if key in vars(base) and vars(base)[key] is getattr(inner, key)
    ]
    yield
    for inner, key in shared:
        setattr(base, key, getattr(inner, key))


class OptimizerSnapshot:
    """An optimizer with all its attributes, for copies and pickles.

    torch copies only an optimizer's groups, state and defaults. An optimizer that holds another one
    would lose it, and many others would lose their settings. As in torch's copies, hooks are not
    copied, nor is a function that replaces `step`.
    """

    def __init__(
        self, optimizer: Optimizer, known: dict[int, Optimizer | OptimizerSnapshot]
    ) -> None:
        known[id(optimizer)] = self
        self._class = type(optimizer)
        self._hooked = getattr(type(optimizer).step, "hooked", False)
        self._made: Optimizer | None = None
        self._attributes = {
            key: OrderedDict() if _are_hooks(key) else _exchanged(value, known)
            for key, value in vars(optimizer).items()
            if key != "step"
        }

    def restored(self) -> Optimizer:
        """The copy, the same at every call."""
        if self._made is None:
            self._made = self._class.__new__(self._class)
            for key, value in self._attributes.items():
                self._made.__dict__[key] = _exchanged(value, {})
            if self._hooked:  # in another process the class may not be patched yet
                self._made._patch_step_function()
        return self._made


def snapshot_of(
    base: Optimizer, known: dict[int, Optimizer | OptimizerSnapshot] | None = None
) -> Optimizer | OptimizerSnapshot:
    """What to copy or pickle: the optimizer itself if it is torch's, else a snapshot of it."""
    known = {} if known is None else known
    if id(base) not in known:
        if type(base).__module__.startswith("torch.optim.") or hasattr(base, "__deepcopy__"):
            known[id(base)] = base
        else:
            OptimizerSnapshot(base, known)
    return known[id(base)]


def _exchanged(value: Any, known: dict[int, Optimizer | OptimizerSnapshot]) -> Any:
    """Replace each optimizer in a value by its snapshot, or each snapshot by its optimizer."""
    if isinstance(value, Optimizer):
        return snapshot_of(value, known)
    if isinstance(value, OptimizerSnapshot):
        return value.restored()
    if type(value) in (list, tuple):
        found = [_exchanged(each, known) for each in value]
        return value if _all_same(found, value) else type(value)(found)
    if type(value) is dict:
        values = {key: _exchanged(each, known) for key, each in value.items()}
        return value if _all_same(values.values(), value.values()) else values
    return value


def _all_same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _are_hooks(attribute: str) -> bool:
    return attribute.startswith("_optimizer_") and attribute.endswith("_hooks")
