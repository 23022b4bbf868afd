"""GraTa's step at test time: its floor, the method written out by hand, and gradkit's engines."""

import functools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.speed.comparison import Comparison, Step, Traffic
from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.problem import Problem
from gradkit import tta
from gradkit.engines import EngineName
from gradkit.tta.objectives import Consistency
from gradkit.tta.statistics import norm_affine_parameters
from gradkit.tta.views import WEAK_VIEWS

BY_HAND = "by hand, augmentation included"


def grata(problem: Problem) -> Comparison:
    """The passes of Algorithm 1, against adapting to a batch of images and predicting it.

    Passes: entropy forward and backward; at the displaced weights one forward for each of six
    weak views, then the strong view's forward and backward; the prediction. Only scales and
    shifts of normalisation layers are trained, which take the batch's own statistics. The floor
    augments nothing.
    """

    def floor() -> Step:
        model, trained, base = _bare(problem)

        def step() -> None:
            torch.autograd.grad(tta.entropy(model, problem.x), trained)
            with torch.no_grad():
                for _ in WEAK_VIEWS:
                    model(problem.x)
            grads = torch.autograd.grad(tta.entropy(model, problem.x), trained)
            _step_on(base, trained, grads)
            with torch.no_grad():
                model(problem.x)

        return step

    def by_hand() -> Step:
        model, trained, base = _bare(problem)
        consistency = Consistency()

        def step() -> None:
            along = torch.autograd.grad(tta.entropy(model, problem.x), trained)
            weights = [parameter.detach() for parameter in trained]
            saved = [weight.clone() for weight in weights]
            torch._foreach_add_(weights, list(along), alpha=-1)
            grads = torch.autograd.grad(consistency(model, problem.x), trained)
            torch._foreach_copy_(weights, saved)
            a, g = (torch.cat([part.flatten() for part in parts]) for parts in (along, grads))
            scale = (torch.cosine_similarity(a, g, dim=0) + 1).square() / 4
            group = base.param_groups[0]
            old, group["lr"] = group["lr"], group["lr"] * float(scale)
            _step_on(base, trained, grads)
            group["lr"] = old
            with torch.no_grad():
                model(problem.x)

        return step

    def ours(engine: EngineName) -> Step:
        adapter = tta.GraTa(problem.model(), optimizer=_sgd, engine=engine)
        return lambda: adapter(problem.x)

    trained = norm_affine_parameters(problem.model()).values()
    numbers = sum(parameter.numel() for parameter in trained)
    return Comparison(
        method="GraTa's step",
        passes="9 forward, 2 backward, base step (2R 1W)",
        floor=floor,
        ours={
            **{gradkit_name(engine): functools.partial(ours, engine) for engine in ENGINES},
            BY_HAND: by_hand,
        },
        peers={},
        traffic=Traffic((("displaced weights", 2, 1), ("cosine", 2, 0)), numbers),
    )


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-6)


def _bare(problem: Problem) -> tuple[nn.Module, list[nn.Parameter], torch.optim.Optimizer]:
    """The network with plain BatchNorm on the batch's statistics, without running ones."""
    model = problem.model().train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    trained = list(norm_affine_parameters(model).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return model, trained, _sgd(trained)


def _step_on(
    base: torch.optim.Optimizer, parameters: list[nn.Parameter], grads: tuple[Tensor, ...]
) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    base.step()
    base.zero_grad()
