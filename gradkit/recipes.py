"""Published methods as chains of transforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradkit.alignment.cosine_lr import Activation, CosineLR
from gradkit.alignment.look_ahead import LookAhead
from gradkit.core.transform import Transform
from gradkit.core.unwrapping import unwrapped
from gradkit.divergence.ascent import ApplyAt, DivergenceAscent, PerturbOn, check_choices
from gradkit.divergence.weight import DivergenceWeight
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.wrapping import wrap
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


_RHO = 0.05


def DiM(  # noqa: N802 # the method's name
    base: Optimizer,
    model: nn.Module | None = None,
    rho: int | float = _RHO,
    perturb_on: PerturbOn | None = "total",
    apply_at: ApplyAt = "perturbed",
    divergence_weight: int | float = 0.1,
    ramp: int | None = None,
    sharpness: Transform | None = None,
    transforms: Sequence[Transform] = (),
    **options: Any,
) -> GradientOptimizer:
    """Sharpness-aware steps that lower an f-divergence between two domains (after DiM, 2024).

    A reconstruction of [DiM: f-Divergence Minimization Guided Sharpness-Aware Optimization for
    Semi-supervised Medical Image Segmentation](https://arxiv.org/abs/2411.12350) from its abstract,
    which has no equations; the authors' code has not been seen. The abstract says that the method
    is sharpness-aware and lowers an f-divergence between source and target; all below is ours. On
    objectives "task", whatever one trains for, and "divergence", D without a weight:

        L(θ) = L_task(θ) + λ(t)·D(P_S ‖ P_T)
        ε    = ρ·∇L(θ) / (‖∇L(θ)‖ + 1e-12)                  perturb_on, of the task or D alone, too
        θ    ← base step on ∇L(θ + ε)                        apply_at, with ∇D at θ, too

    `gk.divergence` has D for segmentations, features and critics. Further objectives count as the
    task. Compute pseudo-labels before `step`, and pass one closure that returns both losses: then
    buffers, such as BatchNorm's statistics, are those at θ; see `gk.divergence.DivergenceAscent`.

    Cost: two gradients of each objective, or fewer; see `gk.divergence.DivergenceAscent`. Memory:
    one flat vector. State: the number of steps.

    Args:
        base: The optimizer to wrap. A critic's parameters have another one, of their own.
        model: See `wrap`.
        rho: The ascent radius ρ ≥ 0.
        perturb_on: What the ascent follows: "total", "task" or "divergence"; None for no ascent.
        apply_at: Where ∇D is taken for the step: "perturbed" or "clean".
        divergence_weight: λ ≥ 0; with 0 the divergence is recorded only.
        ramp: The number of steps over which λ(t) rises to λ; see `gk.divergence.DivergenceWeight`.
            None for a constant.
        sharpness: Another sharpness-aware method in the place of the ascent, which then applies to
            the whole of L: `gk.MSAM()` costs one gradient, `gk.LookSAM(k=5)` 1.2.
        transforms: Further transforms, around these: `gk.EMA(student)` for a teacher.
        **options: Further arguments of `wrap`.

    Returns:
        The optimizer; see `GradientOptimizer`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value (see `wrap`), if `sharpness` comes with other
            choices of the ascent, or if the ascent would follow a divergence of weight 0.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 8.0]))
        >>> base = torch.optim.SGD([w], lr=1.0)
        >>> optimizer = gk.DiM(base, rho=0.5, divergence_weight=0.5)
        >>> _ = optimizer.step(
        ...     {"task": lambda: w[0] ** 2 / 2, "divergence": lambda: w[1] ** 2 / 2}
        ... )
        >>> w.grad  # ∇L = (3, 8/2), so that ε = (0.3, 0.4): (3.3, 8.4/2)
        tensor([3.3000, 4.2000])
    """
    weight = DivergenceWeight(divergence_weight, ramp)
    check_choices("total" if perturb_on is None else perturb_on, apply_at)
    ascents: tuple[Transform, ...] = ()
    if sharpness is not None:
        if (rho, perturb_on, apply_at) != (_RHO, "total", "perturbed"):
            raise ValueError(
                f"sharpness is {sharpness!r}, which makes its own ascent; leave out rho, "
                "perturb_on and apply_at, or pass "
                "sharpness=gk.divergence.DivergenceAscent(rho, perturb_on=..., apply_at=...)"
            )
        ascents = (sharpness,)
    elif perturb_on is not None:
        if perturb_on == "divergence" and divergence_weight == 0:
            raise ValueError(
                "perturb_on is 'divergence' and divergence_weight 0, so that there is nothing to "
                "ascend along; pass a positive divergence_weight"
            )
        ascents = (DivergenceAscent(rho, perturb_on=perturb_on, apply_at=apply_at),)
    return wrap(base, weight, *ascents, *transforms, model=model, **options)


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
