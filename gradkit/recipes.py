"""Published methods as chains of transforms."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradkit.alignment.cosine_lr import Activation, CosineLR
from gradkit.alignment.look_ahead import LookAhead
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.wrapping import wrap
from gradkit.teachers.copying import unwrapped
from gradkit.teachers.gated_ema import GatedEMA


def GraTa(  # noqa: N802 # the method's name
    base: Optimizer,
    model: nn.Module | None = None,
    look_ahead: float = 1.0,
    activation: str | Activation = "quadratic",
    **options: Any,
) -> GradientOptimizer:
    """Gradient alignment with a dynamic learning rate (GraTa, AAAI 2025).

    Algorithm 1 of [Gradient Alignment Improves Test-Time Adaptation for Medical Image
    Segmentation](https://arxiv.org/abs/2408.07343), on objectives "pseudo" and "auxiliary":

        g_a = ∇L_auxiliary(θ)
        g   = ∇L_pseudo(θ − look_ahead·g_a)
        η   = β·f(cos(g, g_a))
        θ   ← base step on g with learning rate η        β the base's own learning rate

    The paper writes the step as plain gradient descent; its code uses Adam with β = 1e-4, whose
    moments are kept from image to image. `gradkit.tta.GraTa` is the whole method on images.

    Cost: one gradient of each objective.

    Args:
        base: The optimizer to wrap.
        model: See `wrap`.
        look_ahead: The step size of the look-ahead step.
        activation: f; see `CosineLR`.
        **options: Further arguments of `wrap`.

    Returns:
        The optimizer; see `GradientOptimizer`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value; see `wrap`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> optimizer = gk.GraTa(torch.optim.SGD([w], lr=0.1))
        >>> _ = optimizer.step(
        ...     {"pseudo": lambda: w.square().sum() / 2, "auxiliary": lambda: w[0] / 2}
        ... )
        >>> optimizer.last_step.lr_scale, w.data  # both point along w
        (tensor(1.), tensor([0.9500, 0.0000]))
    """
    return wrap(
        base,
        LookAhead(along="auxiliary", update="pseudo", step_size=look_ahead),
        CosineLR("pseudo", "auxiliary", activation=activation),
        model=model,
        **options,
    )


_GATE = frozenset(each.name for each in fields(GatedEMA)) - {"student", "teacher"}


def GSEMA(  # noqa: N802 # the method's name
    base: Optimizer,
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    supervised: bool = False,
    **options: Any,
) -> GradientOptimizer:
    """Gradient surgery exponential moving average (GS-EMA, 2024).

    From [GS-EMA: Integrating Gradient Surgery Exponential Moving Average with Boundary-Aware
    Contrastive Learning for Enhanced Domain Generalization in Aneurysm
    Segmentation](https://arxiv.org/abs/2402.15239), on objectives "source", "target" and any
    further ones, such as a contrast (`gradkit.losses.boundary_aware_contrast`):

        g_s, g_t = ∇L_source(θ), ∇L_target(θ)
        α        = decay_aligned if cos(sign g_s, sign g_t) > 0 else decay_conflict
        θ        ← base step on the sum of all objectives' gradients
        teacher  ← α·teacher + (1 − α)·θ

    `GatedEMA` has the gate's options, and says where the paper's text, its algorithm and the
    authors' code differ; the defaults are the code's.

    The authors' code trains the student alone, from a teacher of its own random weights, and the
    teacher's losses are constants. Their Eq. 6 also supervises the teacher. Here the teacher starts
    as a frozen copy of the student; pass a module for another start. With `supervised=True` its
    parameters become a further group of the base optimizer, with the base's default settings, so
    that objectives may train it, and it then moves by the base's step and by the average.

    Cost: one gradient of each objective; the gate takes no further ones.

    Args:
        base: The optimizer to wrap.
        student: The module that is trained.
        teacher: The module that follows it; None makes a copy of the student.
        supervised: Whether the base optimizer trains the teacher, too.
        **options: Further arguments of `GatedEMA` and of `wrap`. `model` is the student by default,
            and a `ModuleDict` of both if the teacher is supervised.

    Returns:
        The optimizer; see `GradientOptimizer`. Its `transforms[0].teacher` is the teacher.

    Raises:
        TypeError: If an argument is of the wrong type or unknown.
        ValueError: If an argument has no valid value, if the student cannot be copied, or if the
            teacher does not fit; see `GatedEMA` and `wrap`.

    Examples:
        >>> import torch, gradkit as gk
        >>> student = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = gk.GSEMA(torch.optim.SGD(student.parameters(), lr=0.1), student)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
        >>> _ = optimizer.step(lambda: dict(zip(("source", "target"), student(x)[:, 0])))
        >>> optimizer.last_step.gate, optimizer.last_step.decay
        (tensor(1.), tensor(0.5000))
    """
    if not isinstance(supervised, bool):
        raise TypeError(f"supervised is {supervised!r}; pass True or False")
    given = {name: options.pop(name) for name in _GATE & options.keys()}
    if teacher is not None:
        given["teacher"] = teacher
    gated = GatedEMA(student, **given)
    if not supervised:
        return wrap(base, gated, **{"model": student, **options})
    both = nn.ModuleDict({"student": student, "teacher": gated.teacher})
    optimizer = wrap(base, gated, **{"model": both, **options})
    known = {id(parameter) for group in base.param_groups for parameter in group["params"]}
    trained = {name for name, each in unwrapped(student).named_parameters() if each.requires_grad}
    further = []
    for name, parameter in unwrapped(gated.teacher).named_parameters():
        if name in trained and id(parameter) not in known:
            further.append(parameter.requires_grad_(True))
    if further:
        optimizer.add_param_group({"params": further})
    return optimizer
