"""`wrap`, which checks its arguments and makes the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradkit.core.ranks import ProcessGroupChoice
from gradkit.core.transform import Transform
from gradkit.engines.choice import EngineName
from gradkit.optimizer.bases import check_base
from gradkit.optimizer.finite_check import Nonfinite
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.options import OnEmpty, RowsChoice, StepOptions


def wrap(
    base: Optimizer,
    *transforms: Transform,
    model: nn.Module | None = None,
    engine: EngineName = "auto",
    nonfinite: Nonfinite = "raise",
    max_norm: float | None = None,
    replay_rng: bool = False,
    scaler: GradScaler | None = None,
    process_group: ProcessGroupChoice = "auto",
    rows: RowsChoice = "auto",
    on_empty: OnEmpty = "raise",
) -> GradientOptimizer:
    """Wrap an optimizer, so that transforms change the gradient before it steps.

    Args:
        base: A `torch.optim.Optimizer` that steps on plain gradients; it may wrap another one. Do
            not step it directly afterwards. Optimizers that evaluate the loss, call backward or
            differentiate gradients themselves are refused. So is `differentiable=True`, since the
            direction of a step has no graph.
        transforms: Applied in this order: the first works on the objectives' own gradients, and
            each further one wraps those before it.
        model: The module whose parameters are optimised. With it, buffers such as BatchNorm's
            running statistics are updated by each objective's first evaluation in a step only, and
            the functional engine can be used.
        engine: How objectives are evaluated at displaced weights. "inplace", the choice of "auto",
            moves the model's own parameters and restores them from a copy. Closures see the
            original parameters with their class, attributes and hooks, and compiled, scripted and
            distributed modules work. "functional" runs closures on other leaves in their place and
            never writes to weights or buffers during a step. It refuses parameters with hooks, with
            attributes or of a subclass, buffers that share memory with a parameter, and compiled,
            scripted, `DistributedDataParallel` and `fully_shard` modules. It raises if a closure
            changes `requires_grad` or assigns `.data`.
        nonfinite: If a loss or gradient is NaN or infinite, "raise" raises an error that names the
            objective, and "skip" changes nothing except torch's default random number generators.
            "ignore" does not check, and needs no copy to the host.
        max_norm: Clip the final direction to this Euclidean norm, after all transforms.
        replay_rng: Whether further evaluations of an objective in a step, at displaced weights, use
            the same random numbers (dropout masks) as its first. By default they draw new ones, as
            in torch. This covers torch's default generators of the CPU and of the parameters'
            device; not numpy's, Python's `random`, nor a `torch.Generator` of your own.
        scaler: Loss scaling for float16, which the step then does itself: it scales losses,
            unscales their gradients, skips a step in which one is not finite (whatever `nonfinite`
            says), and updates the scale once. Do not call the scaler's `step`, `unscale_` or
            `update`; save its `state_dict` beside the optimizer's. A closure that calls backward
            must do so on `scaler.scale(loss)`.
        process_group: The ranks to average gradients over. By default these are the ranks of the
            `DistributedDataParallel` module in `model`, or of the mesh over which `fully_shard` has
            sharded the parameters. For plain modules, pass a group. With None each rank trains by
            itself.
        rows: "keep" computes and stores each objective's gradient, K·P elements in all. "stream"
            stores none of them: inner products, if a rule needs them, come from one backward pass
            batched over objectives, parameter by parameter. The weighted sum of the losses is then
            differentiated once. This needs one closure that returns all losses of one forward pass,
            rules over all parameters, and one process. Operations that `torch.vmap` cannot batch
            raise, and hooks of parameters see the weighted sum. "auto" streams if objectives are
            weighted by their losses only, so that no inner product is needed, and keeps rows
            otherwise. In a streamed step `last_step.gram` is NaN unless a rule has used it.
        on_empty: What to do if the objectives leave nothing to step on (a closure that returns
            None, a filter that keeps no sample, a mapping without losses). "skip" changes nothing
            except torch's default random number generators, and sets `last_step.applied` to False.
            "raise" is an error if the step has several objectives, or a mapping without losses;
            with one objective the base steps without gradients, as in torch, with one warning.

    Returns:
        The optimizer; see `GradientOptimizer`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, if the base optimizer needs more than
            gradients, if the transforms cannot follow each other, or if a teacher's student holds
            none of the optimised parameters.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> gk.wrap(base, gk.PCGrad(), gk.SAM(rho=0.05), model=model).transforms[1]
        SAM(rho=0.05)
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; pass a torch.optim.Optimizer")
    if isinstance(base, GradientOptimizer):
        raise ValueError(
            "base is a gradkit optimizer already; pass all transforms to one wrap() instead"
        )
    check_base(base)
    _check_chain(transforms)
    _check_students(base, transforms)
    options = StepOptions(
        model=model,
        engine=engine,
        nonfinite=nonfinite,
        max_norm=max_norm,
        replay_rng=replay_rng,
        scaler=scaler,
        process_group=process_group,
        rows=rows,
        on_empty=on_empty,
    )
    options.streams(transforms)
    return GradientOptimizer(base, transforms, options)


def _check_chain(transforms: Sequence[Transform]) -> None:
    last: Transform | None = None
    for position, transform in enumerate(transforms):
        if isinstance(transform, type) and issubclass(transform, Transform):
            raise TypeError(f"{transform.__name__} is a class; write {transform.__name__}()")
        if isinstance(transform, (list, tuple)):
            raise TypeError(
                f"a transform is of type {type(transform).__name__}; pass transforms one after the "
                "other, or unpack it: gk.wrap(base, *transforms)"
            )
        if not isinstance(transform, Transform):
            own = " (a function of gradients, or another library's rule, as gk.Aggregate(...))"
            raise TypeError(
                f"a transform is of type {type(transform).__name__}; pass gradkit transforms"
                f"{own if callable(transform) else ''}, and the model as model="
            )
        if any(transform is other for other in _all(transforms[:position])):
            raise ValueError(
                f"{transform!r} is passed twice; make two objects, since each keeps its own state"
            )
        if transform.joins and last is not None:
            raise ValueError(
                f"{transform!r} cannot follow {last!r}, whose result is no weighted sum of "
                "whole gradients; put it first, or, if that is a transform of your own, let it "
                "return one row for each objective, by gradients.replace(rows=)"
            )
        joining = [other for other in transforms[:position] if other.joins]
        if transform.divides and joining:
            raise ValueError(
                f"{transform!r} evaluates objectives one by one, so that {joining[0]!r} before it "
                "would see only one at a time; put it after"
            )
        if transform.sets_update:
            last = transform


def _all(transforms: Sequence[Transform]) -> Iterator[Transform]:
    """The transforms and those inside them."""
    for transform in transforms:
        yield transform
        yield from _all(transform.inside)


def _check_students(base: Optimizer, transforms: Sequence[Transform]) -> None:
    """Check that this optimizer trains the students of all teachers."""
    trained = {id(parameter) for group in base.param_groups for parameter in group["params"]}
    for transform in transforms:
        student = getattr(transform, "student", None)
        if isinstance(student, nn.Module) and trained.isdisjoint(map(id, student.parameters())):
            raise ValueError(
                f"the student of {transform!r} holds none of the parameters that the base "
                "optimizer steps, so that there would be nothing to follow; pass "
                f"{type(transform).__name__} the module that is trained"
            )
