"""How sharp a minimum is: the loss nearby, and the Hessian's largest eigenvalues and trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradkit.core.arguments import check_count, check_number, own_generator
from gradkit.core.gram import norm
from gradkit.sharpness.ascent import Only, is_norm
from gradkit.sharpness.curvature import estimated_trace, largest_eigenvalues
from gradkit.sharpness.mean_loss import MeanLoss, Mode, Objective


@dataclass(frozen=True)
class SharpnessReport:
    """What `report` has measured.

    Attributes:
        loss: L(θ).
        gradient_norm: ‖∇L(θ)‖ over the parameters measured.
        rho: The radius ρ.
        first_order: L(θ + ρ·∇L/‖∇L‖) − L(θ), the rise at the end of SAM's ascent; 0 where the
            gradient is 0.
        sharpness: The largest rise of the loss that was found within the radius, at least 0. This
            is a lower bound of the maximum of L(θ + ε) − L(θ) over ‖ε‖ ≤ ρ; infinite where a loss
            was not a number.
        eigenvalues: The largest eigenvalues of the Hessian, the largest first.
        eigenvalue_errors: For each eigenvalue the norm of its residual, or the rounding error where
            that is more; an eigenvalue of the Hessian is at most so far away.
        trace: The mean of Hutchinson's estimates of the Hessian's trace; None if it was left out.
        trace_error: The standard error of the trace.
        parameters: P, how many numbers the parameters measured have.
        mode: How products with the Hessian were computed: "forward" by forward-mode differentiation
            of the gradient, as is tried first, or "reverse", by differentiating it backwards.
    """

    loss: float
    gradient_norm: float
    rho: float
    first_order: float
    sharpness: float
    eigenvalues: tuple[float, ...]
    eigenvalue_errors: tuple[float, ...]
    trace: float | None
    trace_error: float | None
    parameters: int
    mode: Mode

    def __repr__(self) -> str:
        """The measures, a line each."""
        lines = [
            f"loss            {self.loss:.4g}",
            f"gradient norm   {self.gradient_norm:.4g}",
            f"sharpness       {self.sharpness:.4g} within {self.rho:g}"
            f" ({self.first_order:.4g} along the gradient)",
        ]
        if self.eigenvalues:
            shown = (
                f"{value:.4g} ± {error:.1g}"
                for value, error in zip(self.eigenvalues, self.eigenvalue_errors, strict=True)
            )
            lines.append(f"eigenvalues     {', '.join(shown)}")
        if self.trace is not None:
            lines.append(f"Hessian trace   {self.trace:.4g} ± {self.trace_error:.2g}")
        head = f"SharpnessReport of {self.parameters} parameters:"
        return "\n  ".join([head, *lines])


def report(
    objective: Objective | Sequence[Objective],
    model: nn.Module,
    *,
    rho: int | float = 0.05,
    steps: int = 3,
    eigenvalues: int = 1,
    iterations: int = 30,
    tolerance: int | float = 1e-2,
    trace_samples: int = 10,
    only: Only | None = None,
    generator: torch.Generator | None = None,
) -> SharpnessReport:
    """Measure how sharp the loss is where a model stands.

        sharpness    max over tried ε, ‖ε‖ ≤ ρ, of L(θ + ε) − L(θ)
        eigenvalues  of H = ∇²L(θ), by Lanczos' method with full reorthogonalisation
        trace        of H, by Hutchinson's estimator with random signs

    The sharpness is that of [Foret et al., ICLR 2021](https://arxiv.org/abs/2010.01412). Tried are
    ρ·∇L/‖∇L‖ and, with `eigenvalues`, ±ρ times the eigenvector of the largest (a random direction
    where there is neither); then, from the best of these, `steps` steps
    ε ← Π(ε + ρ·∇L(θ + ε)/‖∇L(θ + ε)‖), where Π scales what is longer than ρ to ρ.

    An objective runs the model and returns the loss, and is called many times. Meanwhile the model
    holds other parameters and clones of its buffers (`torch.func.functional_call`), so an objective
    must look them up in the model. It must not call backward. The model's mode, train or eval, is
    used as it is. Every evaluation starts from the same state of torch's random numbers, so dropout
    draws the same masks; data and other random numbers must stay the same, too. Afterwards
    parameters, their gradients, buffers, modes and torch's random numbers are as before.

    Products with H are computed by forward-mode differentiation of the gradient or, where an
    operation has no formula for that, by differentiating the gradient backwards. Both give the same
    numbers up to rounding. (torch takes the second derivative of a function that is marked
    `once_differentiable` for 0 and does not say so.) In float32 a rise below about 1e-7 of the loss
    is rounding; a model in float64 resolves it.

    Cost: for each objective 1 + `steps` gradients, four losses, and a product with H, about two to
    three gradients, for each iteration and sample. Memory: `iterations` + 6 flat vectors and the
    graph of one objective, however many there are.

    Args:
        objective: A function that returns the loss, or several, of one batch each, whose mean is
            measured.
        model: The model that the objectives use.
        rho: The radius ρ > 0.
        steps: How many steps of projected ascent look for a larger loss.
        eigenvalues: How many eigenvalues; 0 leaves them out. One that occurs several times may be
            found once.
        iterations: The most products with H for the eigenvalues.
        tolerance: The iterations end when the residuals are at most this share of the magnitude
            of H's largest eigenvalue.
        trace_samples: How many estimates of the trace, at least 2; 0 leaves it out.
        only: Which parameters are measured, while the others are constants: "norm" for those of
            normalisation layers, or a function of name and parameter. Frozen ones never are.
        generator: For the first vector and the signs; a new one with seed 0 if None.

    Raises:
        TypeError: If an objective is not callable or does not return a tensor, or an argument is
            not of its kind.
        ValueError: If an argument is out of range, no parameter is left, the model is compiled,
            scripted, sharded or a DistributedDataParallel, or the loss or its derivatives are not
            finite.
        RuntimeError: If the loss does not depend on the parameters by way of the model, or cannot
            be differentiated twice.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
        >>> gk.sharpness.report(lambda: model(x).square().sum() / 2, model, rho=0.1, eigenvalues=2)
        SharpnessReport of 2 parameters:
          loss            0
          gradient norm   0
          sharpness       0.02 within 0.1 (0 along the gradient)
          eigenvalues     4 ± 9e-16, 1 ± 9e-16
          Hessian trace   5 ± 0
    """
    check_number("rho", rho, above=0)
    check_count("steps", steps, least=0)
    check_count("eigenvalues", eigenvalues, least=0)
    check_count("iterations", iterations)
    check_number("tolerance", tolerance, above=0)
    check_count("trace_samples", trace_samples, least=0)
    if trace_samples == 1:
        raise ValueError("trace_samples is 1; the standard error needs at least 2, or pass 0")
    generator = own_generator(generator)
    loss = MeanLoss(_listed(objective), model, _chosen(model, only))
    if eigenvalues > loss.layout.numel:
        raise ValueError(
            f"eigenvalues is {eigenvalues}; the parameters measured have {loss.layout.numel}"
        )
    if eigenvalues > iterations:
        raise ValueError(
            f"iterations is {iterations}; {eigenvalues} eigenvalues take at least as many"
        )
    with loss.protected():
        here, gradient = loss.gradient(loss.start)
        length = float(norm(gradient))
        if not math.isfinite(here) or not math.isfinite(length):
            raise ValueError(
                f"the loss is {here} and the norm of its gradient {length}; both must be finite"
            )
        values: tuple[float, ...] = ()
        errors: tuple[float, ...] = ()
        tried = [gradient * (rho / length)] if length > 0 else []
        if eigenvalues:
            spectrum = largest_eigenvalues(
                loss.product,
                gradient,
                eigenvalues,
                iterations=iterations,
                tolerance=tolerance,
                generator=generator,
            )
            values, errors = spectrum.values, spectrum.errors
            tried += [rho * spectrum.vector, -rho * spectrum.vector]
        if not tried:
            drawn = torch.randn(
                gradient.numel(), generator=generator, dtype=torch.float32, device="cpu"
            ).to(gradient)
            tried = [drawn * (rho / float(norm(drawn)))]
        rises = [_rise(loss.value(loss.displaced(each)), here) for each in tried]
        first_order = rises[0] if length > 0 else 0.0
        best = max(range(len(rises)), key=rises.__getitem__)
        sharpness = max(0.0, rises[best], *_climb(loss, here, tried[best], float(rho), steps))
        trace: tuple[float, float] | tuple[None, None] = (None, None)
        if trace_samples:
            trace = estimated_trace(loss.product, gradient, trace_samples, generator)
    return SharpnessReport(
        loss=here,
        gradient_norm=length,
        rho=float(rho),
        first_order=first_order,
        sharpness=sharpness,
        eigenvalues=values,
        eigenvalue_errors=errors,
        trace=trace[0],
        trace_error=trace[1],
        parameters=loss.layout.numel,
        mode=loss.mode,
    )


def _climb(
    loss: MeanLoss, here: float, start: Float[Tensor, " P"], rho: float, steps: int
) -> Iterator[float]:
    """The rises of the loss on the way of projected ascent."""
    point = start
    for _ in range(steps):
        value, gradient = loss.gradient(loss.displaced(point))
        yield _rise(value, here)
        length = float(norm(gradient))
        if length == 0 or not math.isfinite(length):
            return
        point = point + gradient * (rho / length)
        point = point * (rho / max(rho, float(norm(point))))
    if steps:
        yield _rise(loss.value(loss.displaced(point)), here)


def _rise(value: float, here: float) -> float:
    return math.inf if math.isnan(value) else value - here


def _listed(objective: Objective | Sequence[Objective]) -> list[Objective]:
    if callable(objective):
        return [objective]
    if isinstance(objective, Mapping) or not isinstance(objective, Sequence) or not objective:
        raise TypeError(
            f"objective is {objective!r}; pass a function that returns the loss, or a list of them"
        )
    for number, each in enumerate(objective):
        if not callable(each):
            raise TypeError(
                f"objective {number} is {each!r}; pass a function that runs the model and returns "
                "the loss: lambda: criterion(model(x), y)"
            )
    return list(objective)


def _chosen(model: nn.Module, only: Only | None) -> dict[str, nn.Parameter]:
    """The parameters to measure, by name.

    Raises:
        ValueError: If none is left, or the model's parameters cannot be exchanged.
    """
    for module in model.modules():
        if "_orig_mod" in module._modules or isinstance(
            module, (torch.jit.ScriptModule, DistributedDataParallel)
        ):
            raise ValueError(
                f"the model holds a {type(module).__name__}, whose parameters cannot be exchanged; "
                "pass the plain module, and use it in the objective"
            )
    if only is not None and only != "norm" and not callable(only):
        raise ValueError(
            f"only is {only!r}; pass 'norm', or a function of a parameter's name and the parameter"
        )
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            seen = any(parameter is other for other in found.values())
            if seen or not parameter.requires_grad:
                continue
            if only is None or (is_norm(module) if only == "norm" else only(key, parameter)):
                found[key] = parameter
    if not found:
        raise ValueError(
            f"only is {only!r}, and no parameter of the model that requires a gradient is left; "
            "pass another, or None for all"
        )
    return found
