"""Many objectives: a row kept for each, inner products streamed, or TorchJD's autogram."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradkit as gk
from benchmarks.speed.comparison import Comparison, MakeStep, Step, Traffic
from benchmarks.speed.methods import surgery
from benchmarks.speed.passes import backward_passes, summed_losses
from benchmarks.speed.peers import TORCHJD
from benchmarks.speed.problem import CLASSIFIER, Problem
from benchmarks.speed.timing import Clock, Rounds, summarise, time_in_turn
from benchmarks.tables import Row, interval, table

TO_PASSES = "many objectives: a step / 1 forward and K backward passes"
TO_PLAIN = "many objectives: a step / plain training"
MEMORY = "many objectives: peak memory above plain training, P numbers"
PLAIN = "plain training"
RULES = ("PCGrad", "UPGrad")
"""Those of them that gradkit exports are measured."""
WEIGHTINGS = ("RLW",)
"""Loss weightings, of which the same holds."""
ABOUT = (
    "K losses of one forward pass. Floors: K backward passes one by one, as by hand, and plain "
    'training on the sum of the losses. `rows="keep"` holds K gradients; `rows="stream"` takes '
    f"inner products in one batched backward pass and then differentiates the weighted sum. "
    f"{TORCHJD} does the like with its `autogram.Engine`. Time in turn in one process; peak memory "
    "above plain training, in units of the P parameters, in a fresh process each. The classifier's "
    "objectives are the losses of single samples."
)


def exported(names: Sequence[str]) -> list[str]:
    """Those that gradkit exports."""
    return [name for name in names if hasattr(gk, name)]


def many_objectives(problem: Problem, count: int) -> Comparison:
    """K backward passes, against rules with kept rows, with streamed ones, and by TorchJD."""
    ours: dict[str, MakeStep] = {PLAIN: functools.partial(summed_losses, problem, count)}
    peers: dict[str, MakeStep] = {}
    for name in exported(RULES):
        rule: Callable[[], gk.Transform] = getattr(gk, name)
        ours[f"gradkit, {name}, rows kept"] = functools.partial(
            surgery, problem, count, rule, "functional", "keep"
        )
        ours[f"gradkit, {name}, streamed"] = functools.partial(
            surgery, problem, count, rule, "functional", "stream"
        )
        peers[f"{TORCHJD} autogram, {name}"] = functools.partial(_autogram, problem, count, name)
    return Comparison(
        method=f"K = {count}",
        passes=f"1 forward, {count} backward, base step (2R 1W)",
        floor=functools.partial(backward_passes, problem, count),
        ours=ours,
        peers=peers,
        traffic=Traffic((), problem.parameters()),
    )


def _autogram(problem: Problem, count: int, name: str) -> Step:
    model, base = problem.pair()
    import torchjd.aggregation
    from torchjd.autogram import Engine

    # Samples are told apart in the classifier; BatchNorm mixes the images of a batch.
    engine = Engine(model, batch_dim=0 if problem.network.startswith(CLASSIFIER) else None)
    weighting: nn.Module = getattr(torchjd.aggregation, f"{name}Weighting")()

    def step() -> None:
        losses: Tensor = torch.stack(problem.losses(model, count))
        losses.backward(weighting(engine.compute_gramian(losses)))
        base.step()
        base.zero_grad()

    return step


def measure_many(
    problem: Problem, count: int, clock: Clock, rounds: Rounds, seed: int
) -> list[dict[str, Any]]:
    """Each variant's ratio to both floors."""
    print(f"{problem.network}, {problem.case}, {count} objectives", flush=True)
    comparison = many_objectives(problem, count)
    times = time_in_turn(comparison, clock, rounds)
    rows = []
    to_passes = summarise(times, seed)
    to_plain = summarise({PLAIN: times[PLAIN], **times}, seed, PLAIN)
    for measure, summary in ((TO_PASSES, to_passes), (TO_PLAIN, to_plain)):
        rows += [
            {
                "measure": measure,
                "network": problem.network,
                "case": problem.case,
                "method": comparison.method,
                "variant": variant,
                **numbers,
            }
            for variant, numbers in summary.items()
        ]
    return rows


def stream_table(rows: Sequence[Row]) -> str:
    """Both ratios and the memory, a line for each variant."""

    def found(measure: str) -> Mapping[tuple[str, ...], Row]:
        keys = ("network", "case", "method", "variant")
        return {tuple(row[key] for key in keys): row for row in rows if row["measure"] == measure}

    to_plain, memory = found(TO_PLAIN), found(MEMORY)
    head = ("network", "batch", "objectives", "variant", "ms", "ratio to K backward passes")
    head += ("ratio to plain training", "memory, P numbers")
    return table(
        head,
        4,
        (
            (
                *place,
                f"{row['milliseconds']:.1f}",
                interval(row),
                interval(to_plain[place]),
                f"{memory[place]['value']:.2f}" if place in memory else "",
            )
            for place, row in found(TO_PASSES).items()
        ),
    )
