"""Short trainings that run alike on one process and on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradkit as gk

STEPS = 6
BATCH = 8
KINDS = ("ddp", "fsdp", "group")


class Network(nn.Module):
    """Sizes that do not divide by 2 or 4, and a head that only one objective reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(3)])
        self.register_buffer("scale", torch.ones(()))  # DDP broadcasts it, and waits for all ranks

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.body(x) * self.scale
        return [head(features) for head in self.heads]


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().double()


def batches(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def share(batch: Tensor) -> Tensor:
    """This rank's part of a batch; all of it without ranks."""
    if not dist.is_initialized():
        return batch
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Three objectives that pull the shared body in different directions."""
    a, b, c = model(x)
    return {
        "source": (a - x[:, :1]).square().mean(),
        "target": (b + x[:, :1]).square().mean(),
        "third": (c - x.prod(1, keepdim=True)).square().mean(),
    }


def prepared(kind: str, model: nn.Module, **options: Any) -> nn.Module:
    """The model as it is trained on several ranks."""
    if kind == "ddp":
        return DistributedDataParallel(model, **options)
    if kind == "fsdp":
        fully_shard(model.body, **options)
        fully_shard(model, **options)
    return model


CHAINS: dict[str, Callable[[Callable[[], dict[str, Any]]], tuple[gk.Transform, ...]]] = {
    "PCGrad": lambda teacher: (gk.PCGrad(),),
    "PCGrad by tensor": lambda teacher: (gk.PCGrad(scope="tensor"),),
    "LookAhead+CosineLR": lambda teacher: (
        gk.LookAhead("source", "target"),
        gk.CosineLR("source", "target"),
    ),
    "SAM": lambda teacher: (gk.SAM(rho=0.1),),
    "PCGrad+SAM": lambda teacher: (gk.PCGrad(), gk.SAM(rho=0.1)),
    "GatedEMA": lambda teacher: (gk.GatedEMA(**teacher()),),
    "GatedEMA of the body": lambda teacher: (
        gk.GatedEMA(
            **teacher(),
            measure="cosine",
            only=lambda name, parameter: name.startswith("body"),
            buffers="average",
        ),
    ),
}


def options_for(kind: str, model: nn.Module) -> dict[str, Any]:
    if kind == "group":
        return {"model": model, "process_group": dist.group.WORLD}
    return {"model": model}


def gathered(parameters: Any) -> Tensor:
    """All weights, those of other ranks too, as one vector."""
    parts = []
    for parameter in parameters:
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        parts.append(whole.detach().reshape(-1))
    return torch.cat(parts)


def train(
    kind: str,
    chain: str,
    form: str = "joint",
    parallel: dict[str, Any] | None = None,
    scaled: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Train for some steps; returns everything that must agree."""
    model = prepared(kind, network(), **(parallel or {}))

    def teacher() -> dict[str, Any]:
        made = {"teacher": prepared(kind, network())} if kind == "fsdp" else {}
        return {"student": model, **made}

    transforms = CHAINS[chain](teacher)
    if scaled:
        options["scaler"] = torch.amp.GradScaler("cpu")
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        *transforms,
        **options_for(kind, model),
        **options,
    )
    reported = []
    for batch in batches():
        x = share(batch)
        loss = optimizer.step(objectives(form, model, x))
        record = optimizer.last_step
        reported += [loss[None], record.losses, record.gram.flatten(), record.lr_scale[None]]
        if record.gate is not None:
            reported += [record.gate[None], record.gate_cosine[None], record.gate_rate[None]]
    teachers = [t.teacher for t in transforms if hasattr(t, "teacher")]
    return {
        "weights": gathered(model.parameters()),
        "teacher": gathered([p for t in teachers for p in t.parameters()] or [torch.zeros(1)]),
        "reported": torch.cat(reported),
        "momentum": gathered(
            state["momentum_buffer"]
            for state in (optimizer.state.get(p) for p in model.parameters())
            if state
        ),
    }


def objectives(form: str, model: nn.Module, x: Tensor) -> Any:
    """The same three objectives in each form that `step` takes."""
    names = ("source", "target", "third")
    if form == "one":
        return lambda: sum(losses(model, x).values())
    if form == "joint":
        return lambda: losses(model, x)
    if form == "mapping":
        return {name: lambda name=name: losses(model, x)[name] for name in names}

    def micro_batches(name: str) -> Any:
        for part in x.chunk(2):
            yield losses(model, part)[name] / 2

    return {name: lambda name=name: micro_batches(name) for name in names}


CASES: dict[str, dict[str, Any]] = {
    **{chain: {"chain": chain} for chain in CHAINS},
    "one": {"chain": "SAM", "form": "one"},
    "mapping": {"chain": "PCGrad+SAM", "form": "mapping"},
    "generators": {"chain": "PCGrad+SAM", "form": "generators"},
    "scaled": {"chain": "PCGrad+SAM", "form": "generators", "scaled": True},
    "max_norm": {"chain": "PCGrad", "max_norm": 0.05},
}


def train_all(kind: str, cases: list[str]) -> dict[str, dict[str, Tensor]]:
    return {case: train(kind, **CASES[case]) for case in cases}


VARIANTS = ("bucket views", "unused parameters", "no buffers", "two dimensions")


def train_variants() -> dict[str, dict[str, Tensor]]:
    """Options of DDP and fully_shard that change how gradients are held; four ranks."""
    ddp: dict[str, dict[str, Any]] = {
        "bucket views": {"gradient_as_bucket_view": True},
        "unused parameters": {"find_unused_parameters": True},
        "no buffers": {"broadcast_buffers": False},
    }
    runs = {name: train("ddp", "PCGrad+SAM", parallel=options) for name, options in ddp.items()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    runs["two dimensions"] = train("fsdp", "PCGrad+SAM", parallel={"mesh": mesh})
    return runs


def train_at_hand(kind: str) -> dict[str, Tensor]:
    """A loop without `wrap`, whose gate compares gradients that the loop has taken itself."""
    model, teacher = prepared(kind, network()), prepared(kind, network())
    gated = gk.GatedEMA(model, teacher, only=lambda name, parameter: name.startswith("body"))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    gates = []
    for batch in batches(20):  # of which some open the gate
        rows: list[list[Tensor | None]] = []
        for name in ("source", "target"):
            base.zero_grad()
            losses(model, share(batch))[name].backward()
            rows.append([parameter.grad for parameter in model.parameters()])
        for parameter, a, b in zip(model.parameters(), *rows, strict=True):
            parameter.grad = b if a is None else a if b is None else a + b
        gate = gated.gate(*rows)
        base.step()
        gates.append(gate)
        gated.update(gate)
    return {"teacher": gathered(teacher.parameters()), "gates": torch.stack(gates)}
