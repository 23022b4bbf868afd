"""Which optimizers can be a base: those that step on what `.grad` holds, and on nothing else."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam

# Methods of optimizers that call backward, or move to other weights, by themselves.
_OWN_BACKWARD = ("backward", "fused_backward")
_OWN_POINTS = (("first_step", "second_step"), ("perturb_weights", "un_perturb"))


def check_base(base: Optimizer) -> None:
    """Check that an optimizer steps on plain gradients that somebody else has left in `.grad`.

    What is looked at is the class: its name and methods, the signature of `step`, and, where the
    source is to be had, whether `step` raises without a closure.

    Raises:
        ValueError: If it needs more, which a step of gradkit's cannot give.
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
    if _needs_closure(step):
        return (
            "cannot step without a closure, and a base gets none: the loss is evaluated before, "
            "by gradkit; wrap an optimizer that steps on what .grad holds"
        )
    groups = getattr(base, "param_groups", None)
    if not groups or groups[0] is not base.param_groups[0]:
        return (
            "has no param_groups that could be written to, as torch's optimizers do; wrap the "
            "optimizer inside it"
        )
    return None


def check_group(group: Mapping[str, Any], number: int, base: Optimizer) -> None:
    """Check that a parameter group asks for nothing that a step cannot give.

    Raises:
        ValueError: If it is to be differentiated through.
    """
    # torch looks at the defaults for whether a graph is recorded at all.
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


def _needs_closure(step: Callable[..., Any]) -> bool:
    """Whether `step` has an argument without a default, or raises where its closure is None."""
    arguments = list(inspect.signature(step).parameters.values())[1:]
    named = [each for each in arguments if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if any(each.default is each.empty for each in named):
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step)))
    except (OSError, SyntaxError, TypeError):  # no source, or part of a larger expression
        return False
    body = getattr(tree.body[0], "body", [])
    return any(_refuses_none(statement) for statement in body if isinstance(statement, ast.stmt))


def _refuses_none(statement: ast.stmt) -> bool:
    """Whether it reads `if closure is None: raise ...` or `assert closure is not None`."""
    if isinstance(statement, ast.If):
        missing = {"closure is None", "not closure"}
        raises = any(isinstance(each, ast.Raise) for each in statement.body)
        return raises and ast.unparse(statement.test) in missing
    present = {"closure is not None", "closure", "callable(closure)"}
    return isinstance(statement, ast.Assert) and ast.unparse(statement.test) in present


def inner_optimizers(base: Optimizer) -> list[Optimizer]:
    """The optimizers that an optimizer holds as its attributes."""
    return [each for each in vars(base).values() if isinstance(each, Optimizer)]


@contextmanager
def sharing_kept(base: Optimizer) -> Iterator[None]:
    """Let a base and the optimizer inside it share after the block what they shared before it.

    Loading replaces the lists and dicts of the one inside; one that has taken them over as
    attributes of its own would go on with the old ones, and not see learning rates change.
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


class Whole:
    """An optimizer with all its attributes, for copies and pickles.

    torch copies an optimizer's groups, state and defaults only, which leaves one that holds
    another without the one inside. As in torch's copies, hooks and what somebody else has put in
    place of `step` stay behind.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._class = type(optimizer)
        self._attributes = {
            key: OrderedDict() if _are_hooks(key) else value
            for key, value in vars(optimizer).items()
            if key != "step"
        }
        self._hooked = getattr(type(optimizer).step, "hooked", False)

    def restored(self) -> Optimizer:
        """The copy."""
        made = self._class.__new__(self._class)
        made.__dict__.update(self._attributes)
        if self._hooked:  # in another process the class may be a fresh one
            made._patch_step_function()
        return made


def whole(base: Optimizer) -> Optimizer | Whole:
    """What to copy or pickle for a base: itself, or all its attributes if it holds another."""
    return Whole(base) if inner_optimizers(base) and not hasattr(base, "__deepcopy__") else base


def _are_hooks(attribute: str) -> bool:
    return attribute.startswith("_optimizer_") and attribute.endswith("_hooks")
