"""What only a CUDA device can show: launches beyond the passes, and waits of the host.

None of this has been run: there was no such device where it was written.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import gradkit as gk
from benchmarks.speed.comparison import Comparison, Step
from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.problem import Problem

CHAINS: dict[str, tuple[tuple[str, ...], Callable[[], tuple[gk.Transform, ...]]]] = {
    "no transform": (("loss",), lambda: ()),
    "PCGrad, K = 2": (("0", "1"), lambda: (gk.PCGrad(),)),
    "PCGrad, K = 4": (("0", "1", "2", "3"), lambda: (gk.PCGrad(),)),
    "SAM": (("loss",), lambda: (gk.SAM(),)),
    "GraTa": (("pseudo", "auxiliary"), lambda: (gk.LookAhead(), gk.CosineLR())),
}


def launches_beyond(comparison: Comparison) -> list[dict[str, object]]:
    """Kernel launches of each of gradkit's variants, less those of the floor."""
    floor = launches(comparison.floor())
    return [
        {"method": comparison.method, "variant": name, "launches": launches(make()) - floor}
        for name, make in comparison.ours.items()
        if name not in comparison.without
    ]


def launches(step: Step) -> int:
    """Kernel launches of one step."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key)


def host_waits(problem: Problem) -> list[dict[str, str]]:
    """For each chain and engine, "none" or what makes the host wait for the device.

    The step does not look for NaNs (`nonfinite="ignore"`), and the learning rate is a tensor.
    """
    rows = []
    for method, (names, make_chain) in CHAINS.items():
        for engine in ENGINES:
            model = problem.model()
            lr = torch.tensor(1e-6, device=problem.x.device)
            base = torch.optim.Adam(model.parameters(), lr=lr, capturable=True)
            optimizer = gk.wrap(base, *make_chain(), model=model, engine=engine, nonfinite="ignore")

            def closure(model: torch.nn.Module = model, names: tuple[str, ...] = names) -> object:
                losses: list[Tensor] = problem.losses(model, len(names))
                return dict(zip(names, losses, strict=True))

            optimizer.step(closure)  # the first step makes states
            rows.append(
                {
                    "method": method,
                    "variant": gradkit_name(engine),
                    "waits": _wait_in(lambda step=optimizer.step, it=closure: step(it)),  # type: ignore[misc]  # bound at once
                }
            )
    return rows


def _wait_in(step: Step) -> str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"
