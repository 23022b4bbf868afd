"""What happens on each rank when something is wrong on one of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradkit as gk
from processes.training import batches, gathered, losses, network, options_for, prepared, share


def made(
    *transforms: gk.Transform, kind: str = "ddp", lr: float = 0.1, **options: Any
) -> tuple[nn.Module, gk.GradientOptimizer]:
    model = prepared(kind, network())
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, gk.wrap(base, *transforms, model=model, **options)


def outcome(step: Callable[[], Any]) -> str:
    """The error's type and message; empty if there was none."""
    try:
        step()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def bits(model: nn.Module, optimizer: gk.GradientOptimizer) -> Tensor:
    """Weights, buffers, gradients and momentum of this rank as one vector."""
    parts = [*model.parameters(), *model.buffers()]
    parts += [p.grad for p in model.parameters() if p.grad is not None]
    parts += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    parts = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    state = torch.frombuffer(bytearray(repr(optimizer.state_dict()).encode()), dtype=torch.uint8)
    return torch.cat([part.detach().reshape(-1).double() for part in [*parts, state]])


def failing(error: BaseException, at: int, *, after_forward: bool, good: int = 2) -> dict[str, Any]:
    """Rank 1 raises in its `at`-th evaluation; nothing may be lost, and training goes on.

    Args:
        error: What it raises.
        at: In which evaluation of the step, from 1.
        after_forward: Whether it has called the model before.
        good: How many steps without failure come first.
    """
    model, optimizer = made(gk.PCGrad(), gk.SAM(rho=0.1))
    twin, twin_optimizer = made(gk.PCGrad(), gk.SAM(rho=0.1))
    calls = 0

    def closure() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        raises = dist.get_rank() == 1 and calls == at
        if raises and not after_forward:
            raise error
        found = losses(model, x)
        if raises:
            raise error
        return found

    at, target = 0, at
    for batch in batches()[:good]:
        x = share(batch)
        optimizer.step(closure)
    calls, at, x = 0, target, share(batches()[good])
    before = bits(model, optimizer)
    message = outcome(lambda: optimizer.step(closure))
    kept = torch.equal(before, bits(model, optimizer))
    at = 0
    optimizer.step(closure)
    for batch in batches()[: good + 1]:
        x = share(batch)
        twin_optimizer.step(lambda: losses(twin, x))
    same = all(map(torch.equal, model.parameters(), twin.parameters()))
    return {"message": message, "kept": kept, "goes on": same}


def unused_on_one_rank(kind: str) -> dict[str, Any]:
    """The third head is reached on rank 0 only; one process sees half of that rank's loss."""
    model = prepared(kind, network())
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(), **options_for(kind, model))
    running = dist.is_initialized()

    def loss(x: Tensor, *, third: bool) -> Tensor:
        found = losses(model, x)
        return found["source"] + (found["third"] if third else 0)

    def closure() -> Tensor:
        if running:
            return loss(share(x), third=dist.get_rank() == 0)
        left, right = x.chunk(2)
        return (loss(left, third=True) + loss(right, third=False)) / 2

    for x in batches()[:5]:  # noqa: B007 # read in the closure
        optimizer.step(closure)
    heads = (model.module if kind == "ddp" else model).heads
    reached = [head.weight.grad is not None for head in heads]
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"weights": weights, "reached": reached}


def differing(what: str) -> str:
    """The ranks disagree about something that they must share."""
    rank = dist.get_rank()
    seed = rank if what == "generator" else 0
    rule = gk.PCGrad(generator=torch.Generator().manual_seed(seed))
    model, optimizer = made(rule, lr=0.1 + (rank if what == "lr" else 0))
    x = share(batches()[0])

    def closure() -> dict[str, Tensor]:
        found = losses(model, x)
        if what == "names" and rank:
            found["other"] = found.pop("third")
        if what == "count" and rank:
            del found["third"]
        return found

    return outcome(lambda: optimizer.step(closure))


def nonfinite_on_one_rank(mode: str) -> dict[str, Any]:
    """Rank 1's loss of "target" is NaN."""
    model, optimizer = made(gk.PCGrad(), nonfinite=mode)
    x = share(batches()[0])

    def closure() -> dict[str, Tensor]:
        found = losses(model, x)
        if dist.get_rank() == 1:
            found["target"] = found["target"] * torch.nan
        return found

    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    message = outcome(lambda: optimizer.step(closure))
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"message": message, "kept": torch.equal(before, after)}


def overflow_on_one_rank() -> dict[str, Any]:
    """Rank 1's scaled loss overflows; all pass over the step and halve the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = DistributedDataParallel(network().float())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad(), gk.SAM(), model=model, scaler=scaler)
    x = share(batches()[0]).float()
    factor = 1.0

    def closure() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.float16):
            found = losses(model, x)
        return {name: loss * factor for name, loss in found.items()}

    optimizer.step(closure)
    good = optimizer.last_step.applied
    factor = 1e36 if dist.get_rank() == 1 else 1.0
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    return {
        "good": good,
        "applied": optimizer.last_step.applied,
        "kept": all(map(torch.equal, before, model.parameters())),
        "scale": scaler.get_scale(),
    }


def unclear() -> dict[str, str]:
    """Nothing says how the ranks belong together."""
    x = share(batches()[0])
    model = network()

    def sgd() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    plain = gk.wrap(sgd(), gk.PCGrad())
    with_model = gk.wrap(sgd(), gk.PCGrad(), model=model)
    alone = gk.wrap(sgd(), gk.PCGrad(), model=model, process_group=None)
    return {
        "no model": outcome(lambda: plain.step(lambda: losses(model, x))),
        "plain model": outcome(lambda: with_model.step(lambda: losses(model, x)["source"])),
        "alone": outcome(lambda: alone.step(lambda: losses(model, x))),
    }


def reduced_by_ddp() -> Tensor:
    """One objective and no model: DDP's own reduction does it, also for SAM."""
    model = DistributedDataParallel(network())
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(rho=0.1))
    for batch in batches()[:3]:
        optimizer.step(lambda: sum(losses(model, share(batch)).values()))
    optimizer.zero_grad()
    sum(losses(model, share(batches()[3])).values()).backward()
    stepping = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), model=model)
    stepping.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def own_backward() -> Tensor:
    """Closures that call backward themselves, in DDP's usual mode."""
    model, optimizer = made(gk.SAM(rho=0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(losses(model, share(batch)).values())
        loss.backward()
        return loss

    for batch in batches()[:3]:  # noqa: B007 # read in the closure
        optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def buffers(kind: str) -> dict[str, Tensor]:
    """BatchNorm statistics are the first rank's, from its first evaluation."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model = prepared(kind, plain)
    ema = gk.EMA(model, decay=0.5)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = gk.wrap(base, gk.SAM(), ema, **options_for(kind, model))
    for batch in batches()[:3]:
        optimizer.step(lambda: model(share(batch)).square().mean())
    return {
        "mean": plain[1].running_mean.clone(),
        "teacher": ema.teacher[1].running_mean.clone(),
        "count": plain[1].num_batches_tracked.clone(),
    }


def refusals() -> dict[str, str]:
    """Ways of wrapping a model that cannot be right."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    x = share(batches()[0])
    messages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    optimizer = gk.wrap(torch.optim.SGD(old.parameters(), lr=0.1), model=old)
    messages["FSDP1"] = outcome(lambda: optimizer.step(lambda: losses(old, x)))
    model = DistributedDataParallel(network())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, model=model, process_group=None)
    messages["DDP alone"] = outcome(lambda: optimizer.step(lambda: losses(model, x)))
    messages["functional"] = outcome(lambda: gk.wrap(base, model=model, engine="functional"))
    static = DistributedDataParallel(network(), static_graph=True)
    optimizer = gk.wrap(torch.optim.SGD(static.parameters(), lr=0.1), model=static)
    messages["static graph"] = outcome(lambda: optimizer.step(lambda: losses(static, x)))
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with model.join():
        messages["join"] = outcome(lambda: optimizer.step(lambda: losses(model, x)))
    sharded = prepared("fsdp", network())
    base = torch.optim.SGD(sharded.parameters(), lr=0.1)
    messages["teacher"] = outcome(lambda: gk.EMA(sharded, decay=0.9))
    messages["mixed"] = outcome(
        lambda: gk.wrap(
            torch.optim.SGD([*sharded.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
        ).step(lambda: losses(sharded, x))
    )
    optimizer = gk.wrap(base, model=sharded, process_group=dist.group.WORLD)
    messages["mesh"] = outcome(lambda: optimizer.step(lambda: losses(sharded, x)))
    return messages


FAILURES = {
    "at the very first": lambda: failing(ValueError("bad data"), 1, after_forward=False, good=0),
    "at the first evaluation": lambda: failing(ValueError("bad data"), 1, after_forward=False),
    "after the forward": lambda: failing(ValueError("bad data"), 1, after_forward=True),
    "at the displaced weights": lambda: failing(ValueError("bad data"), 2, after_forward=True),
    "by Ctrl-C": lambda: failing(KeyboardInterrupt(), 1, after_forward=True),
}
DIFFERENCES = ("names", "count", "lr", "generator")


def all_scenarios() -> dict[str, Any]:
    return {
        **{name: scenario() for name, scenario in FAILURES.items()},
        **{what: differing(what) for what in DIFFERENCES},
        **{f"unused {kind}": unused_on_one_rank(kind) for kind in ("ddp", "group")},
        **{mode: nonfinite_on_one_rank(mode) for mode in ("raise", "skip")},
        "overflow": overflow_on_one_rank(),
        "unclear": unclear(),
        "reduced by DDP": reduced_by_ddp(),
        "own backward": own_backward(),
        **{f"buffers {kind}": buffers(kind) for kind in ("ddp", "group")},
        "refusals": refusals(),
    }


def fails_among_collectives() -> dict[str, Any]:
    """A closure under fully_shard raises on rank 1 before the forward that the others gather in."""
    model, optimizer = made(gk.PCGrad(), kind="fsdp")
    x = share(batches()[0])
    optimizer.step(lambda: losses(model, x))
    before = bits(model, optimizer)

    def closure() -> dict[str, Tensor]:
        if dist.get_rank() == 1:
            raise ValueError("bad data")
        return losses(model, x)

    start = time.monotonic()
    message = outcome(lambda: optimizer.step(closure))
    seconds = time.monotonic() - start
    time.sleep(12 - seconds if dist.get_rank() == 1 else 0)  # the others wait for a living rank
    return {
        "message": message,
        "seconds": seconds,
        "kept": torch.equal(before, bits(model, optimizer)),
    }


class FailsAtSecond(torch.optim.SGD):
    """A base optimizer that fails on rank 1 in its second step."""

    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2 and dist.get_rank() == 1:
            raise OSError("disk full")
        return super().step(closure)


def base_fails() -> list[str]:
    """The base optimizer's own failure cannot be undone elsewhere, but does not go unnoticed."""
    model = DistributedDataParallel(network())
    optimizer = gk.wrap(FailsAtSecond(model.parameters(), lr=0.1), gk.PCGrad(), model=model)
    x = share(batches()[0])
    return [outcome(lambda: optimizer.step(lambda: losses(model, x))) for _ in range(4)]


def hook_fails() -> str:
    """A hook before the step raises on one rank."""
    model, optimizer = made(gk.PCGrad())

    def hook(*arguments: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError("no such file")

    optimizer.register_step_pre_hook(hook)
    x = share(batches()[0])
    return outcome(lambda: optimizer.step(lambda: losses(model, x)))


def optimising_different_things(what: str) -> str:
    """Ranks whose flat vectors mean different weights."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    parameters = list(model.parameters())
    options: dict[str, Any] = {}
    lr: Any = 0.1
    if what == "order" and rank:
        parameters.reverse()
    if what == "frozen":
        model.module.heads[rank].requires_grad_(False)
    if what == "tensor lr":
        lr = torch.tensor(0.1 * (1 + rank))
    if what == "max_norm":
        options["max_norm"] = 1.0 + rank
    if what == "on_empty":
        options["on_empty"] = ("raise", "skip")[rank]
    base = torch.optim.SGD(parameters, lr=lr)
    optimizer = gk.wrap(base, gk.PCGrad(), model=model, **options)
    x = share(batches()[0])
    return outcome(lambda: optimizer.step(lambda: losses(model, x)))


def gradients_from_before(form: str) -> Tensor:
    """Plain modules in a group: gradients that were there before the step are averaged, too."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad(), **options_for("group", model))
    loss = sum(losses(model, share(batches()[0])).values())
    loss.backward()
    if form == "no closure":
        optimizer.step()
    else:
        optimizer.step(lambda: loss.detach())
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def second_optimizer() -> Tensor:
    """Gradients that a closure leaves for another optimizer are averaged as DDP would."""
    model = DistributedDataParallel(network())
    body, heads = model.module.body, model.module.heads
    first = gk.wrap(torch.optim.SGD(body.parameters(), lr=0.1), gk.SAM(rho=0.0), model=model)
    second = torch.optim.SGD(heads.parameters(), lr=0.1)

    def closure() -> Tensor:
        first.zero_grad()
        second.zero_grad()
        loss = sum(losses(model, share(batches()[0])).values())
        loss.backward()
        return loss

    first.step(closure)
    second.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def outside_the_group() -> str:
    """A rank that is no member of the group it passes."""
    model = network()
    group = dist.new_group([0])
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad(), model=model, process_group=group)
    x = share(batches()[0])
    return outcome(lambda: optimizer.step(lambda: losses(model, x)))


def gathered_by_validation() -> dict[str, Any]:
    """Under fully_shard a forward without backward, of student or teacher, leaves them gathered."""
    results = {}
    for validates in (True, False):
        model, teacher = (prepared("fsdp", network()) for _ in range(2))
        teacher.requires_grad_(False)
        ema = gk.EMA(model, teacher, decay=0.5)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = gk.wrap(base, gk.SAM(rho=0.5), ema, model=model)
        for batch in batches()[:3]:
            x = share(batch)
            if validates:
                with torch.no_grad():
                    model(x)
                    teacher(x)
            optimizer.step(lambda: losses(model, x))
        results[validates] = gathered([*model.parameters(), *teacher.parameters()])
    return {"with": results[True], "without": results[False]}


def not_cleared_under_fsdp() -> str:
    """A rank that holds no part of the smallest parameter finds out, too."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(3, 1).double())
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x = share(batches()[0])
    model(x).sum().backward()

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return outcome(lambda: optimizer.step(closure))


FURTHER = {
    "base fails": base_fails,
    "hook fails": hook_fails,
    **{
        f"different {what}": lambda what=what: optimising_different_things(what)
        for what in ("order", "frozen", "tensor lr", "max_norm", "on_empty")
    },
    **{form: lambda form=form: gradients_from_before(form) for form in ("no closure", "reporting")},
    "second optimizer": second_optimizer,
    "outside": outside_the_group,
    "validation": gathered_by_validation,
    "not cleared": not_cleared_under_fsdp,
}


def further_scenarios() -> dict[str, Any]:
    return {name: scenario() for name, scenario in FURTHER.items()}
