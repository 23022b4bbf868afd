"""Short trainings by every method, on one process and on several ranks."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from surgery.dummies import OWN
from surgery.table import EXPORTED, Entry

import gradkit as gk
from gradkit.surgery import ElementwiseRule
from processes.training import batches, gathered, losses, network, options_for, prepared, share

# Those that ascend: each look at weights, norms and state is of all ranks' parts.
ASCENTS: dict[str, Entry] = {
    name: Entry(lambda count, make=make, **options: make(**options))
    for name, make in {
        "ASAM": functools.partial(gk.ASAM, adaptive="all"),
        "GSAM": gk.GSAM,
        "FriendlySAM": gk.FriendlySAM,
        "LookSAM": functools.partial(gk.LookSAM, k=2),
        "GAM": gk.GAM,
        "MSAM": gk.MSAM,
        "WSAM": gk.WSAM,
        "SAMPa": gk.SAMPa,
        "AESAM": gk.AESAM,
        "SAM of some": functools.partial(gk.SAM, only=lambda name, parameter: "heads" in name),
        "SlowWeights": functools.partial(gk.SlowWeights, k=2),
    }.items()
}
ASCENTS["DivergenceAscent"] = Entry(
    lambda count, **options: gk.divergence.DivergenceAscent(
        perturb_on="divergence", apply_at="clean", **options
    ),
    names=("task", "divergence", "third"),
)
ASCENTS["DivergenceWeight"] = Entry(
    lambda count, **options: gk.divergence.DivergenceWeight(ramp=3, **options),
    names=("divergence", "task", "third"),
)
METHODS = {**EXPORTED, **OWN, **ASCENTS}
STEPS = 4


def cases() -> dict[str, tuple[str, dict[str, str]]]:
    """Every method; and a rule that remembers and one that draws, with other scopes."""
    found: dict[str, tuple[str, dict[str, str]]] = {name: (name, {}) for name in METHODS}
    for name in ("Recalling", "Drawn"):
        for scope in ("group", "tensor", "shared"):
            found[f"{name} by {scope}"] = (name, {"scope": scope})
    return found


CASES = cases()


def train(kind: str, case: str) -> dict[str, Any]:
    """Train for some steps; returns everything that must agree."""
    name, options = CASES[case]
    model = prepared(kind, network())
    method = METHODS[name].make(len(METHODS[name].names), **options)
    # SAM evaluates twice, so that what is drawn or remembered twice shows.
    twice = isinstance(method, ElementwiseRule) or name in OWN
    around = (gk.SAM(rho=0.05),) if twice else ()
    parameters = list(model.parameters())
    optimizer = gk.wrap(
        torch.optim.SGD(
            [{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.1, momentum=0.9
        ),
        method,
        *around,
        **options_for(kind, model),
    )
    reported = []
    for batch in batches()[:STEPS]:
        x = share(batch)
        objectives = zip(METHODS[name].names, ("source", "target", "third"), strict=True)
        loss = optimizer.step({own: objective(model, x, theirs) for own, theirs in objectives})
        record = optimizer.last_step
        reported += [loss[None], record.losses, record.gram.flatten(), record.weights]
    generator = torch.zeros(1) if method.generator is None else method.generator.get_state()
    return {
        "weights": gathered(model.parameters()),
        "reported": torch.cat(reported),
        "generator": generator,
        "remembered": optimizer.state_dict()["param_groups"][0]["gradkit"],
    }


def objective(model: torch.nn.Module, x: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
    return lambda: losses(model, x)[name]


def try_to_train(kind: str, case: str) -> dict[str, Any]:
    """What training returns; where it fails, the error."""
    try:
        return train(kind, case)
    except Exception as error:
        return {"error": str(error), "traceback": traceback.format_exc()}


def train_all(kind: str) -> dict[str, dict[str, Any]]:
    return {case: try_to_train(kind, case) for case in CASES}
