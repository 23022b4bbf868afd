"""The step of every sharpness-aware method, beside as many plain passes and beside peers.

What a step of AESAM costs depends on the data, and is measured where it climbs in every step. DISAM
has two domains, each half of the batch, and so does its floor.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gradkit as gk
from benchmarks.speed.comparison import FLOOR, Comparison, MakeStep, Step, Traffic
from benchmarks.speed.methods import gradkit_name
from benchmarks.speed.peers import PYTORCH_OPTIMIZER
from benchmarks.speed.problem import Problem
from benchmarks.speed.timing import Clock, Rounds, summarise, time_in_turn
from benchmarks.tables import Row, interval, table

TO_PASSES = "a sharpness-aware step / plain passes"
VARIANT = gradkit_name("inplace")
EXAMPLES = 1000
LOOK = 5
"""k of LookSAM and of Every."""
DOMAINS = 2
"""Of DISAM."""
ABOUT = (
    "Beside as many forward and backward passes as the method needs, with one step of the base; "
    f"LookSAM and Every (k = {LOOK}) beside one pass a step, with {LOOK} steps timed together. "
    "AESAM climbs in every step here. ESAM has its default arguments, losses per sample and a "
    "closure that takes `samples`: its second pass is on half of the batch, that of the floor on "
    "all of it, and it has one more forward pass without a graph. "
    f"DISAM and its floor take a gradient of each of {DOMAINS} domains, which are parts of the "
    "batch. Methods of the same number of passes, and the peers, take turns in one process, in the "
    "in-place engine."
)


Form = Literal["loss", "samples", "domains"]


@dataclass(frozen=True)
class Sharp:
    """A method as it is measured.

    Attributes:
        make: Makes it, with its default arguments but for k.
        passes: Forward and backward passes of a step; of LookSAM those of most steps.
        memory: Flat vectors beyond plain training, as its documentation says.
        momentum: Its base's, and the floor's.
        cycle: How many steps are timed together.
        form: What the objectives are: one loss, one per sample, or one per domain.
    """

    make: Callable[[], gk.Transform]
    passes: int
    memory: float
    momentum: float = 0.0
    cycle: int = 1
    form: Form = "loss"


METHODS: Mapping[str, Sharp] = {
    "SAM": Sharp(gk.SAM, 2, 1),
    "ASAM": Sharp(gk.ASAM, 2, 2),
    "GSAM": Sharp(gk.GSAM, 2, 2),
    "SAGM": Sharp(gk.SAGM, 2, 2),
    "WSAM": Sharp(gk.WSAM, 2, 2),
    "FriendlySAM": Sharp(gk.FriendlySAM, 2, 4),
    "VaSSO": Sharp(gk.VaSSO, 2, 4),
    "SAMPa": Sharp(gk.SAMPa, 2, 4),
    "BSAM": Sharp(functools.partial(gk.BSAM, EXAMPLES), 2, 6),
    "MSAM": Sharp(gk.MSAM, 1, 1, momentum=0.9),
    "SlowWeights": Sharp(gk.SlowWeights, 1, 2, momentum=0.9),
    "LookSAM": Sharp(functools.partial(gk.LookSAM, k=LOOK), 1, 3, cycle=LOOK),
    "CRSAM": Sharp(gk.CRSAM, 3, 3),
    "GAM": Sharp(gk.GAM, 4, 6),
    "ESAM": Sharp(gk.ESAM, 2, 2, form="samples"),
    "AESAM": Sharp(functools.partial(gk.AESAM, lambda_1=-1e9, lambda_2=-1e9), 2, 2),
    "DISAM": Sharp(gk.DISAM, 2, DOMAINS + 2, form="domains"),
    "Every": Sharp(lambda: gk.Every(LOOK, gk.SAM()), 1, 1, cycle=LOOK),
}
LIMITS: Mapping[str, float] = {"2x64": 1.10, "4x128": 1.07, "8x192": 1.03}
"""What methods of one and of two passes may cost at each case of ResUNet-34."""
LOOKSAM_LIMITS: Mapping[str, float] = {"2x64": 1.35, "4x128": 1.28, "8x192": 1.24}


def limits() -> list[tuple[str, str, float]]:
    """Methods, cases and what a step may cost there."""
    return [
        (name, case, limit)
        for name, method in METHODS.items()
        if method.passes <= 2
        for case, limit in (LOOKSAM_LIMITS if method.cycle > 1 else LIMITS).items()
    ]


def ours(problem: Problem, name: str) -> Step:
    """Gradkit's step."""
    method = METHODS[name]
    model, base = problem.pair(method.momentum)
    optimizer = gk.wrap(base, method.make(), model=model)
    objectives = objectives_of(problem, model, method.form)

    def step() -> None:
        for _ in range(method.cycle):
            optimizer.step(objectives)
            optimizer.zero_grad()

    return step


def objectives_of(problem: Problem, model: nn.Module, form: Form) -> Any:
    """The objectives of a step."""
    if form == "samples":

        def losses(samples: Tensor | None = None) -> Tensor:
            output: Tensor = model(problem.x if samples is None else problem.x[samples])
            return output.square().flatten(1).mean(1)

        return losses
    if form == "domains":
        parts = problem.x.chunk(DOMAINS)
        return {
            str(number): functools.partial(_loss, model, part) for number, part in enumerate(parts)
        }
    return lambda: problem.loss(model)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output.square().mean()


def floor(problem: Problem, passes: int, momentum: float, cycle: int, form: Form = "loss") -> Step:
    """Plain passes and one step of the base, as often as the methods' steps are timed together."""
    model, base = problem.pair(momentum)
    whole = [functools.partial(problem.loss, model)]
    parts = [functools.partial(_loss, model, part) for part in problem.x.chunk(DOMAINS)]
    closures = parts if form == "domains" else whole

    def step() -> None:
        for _ in range(cycle):
            for _ in range(passes):
                for closure in closures:
                    base.zero_grad()
                    closure().backward()
            base.step()
            base.zero_grad()

    return step


def peers(problem: Problem) -> dict[str, MakeStep]:
    """pytorch-optimizer's methods by the name of gradkit's.

    Its BSAM is another rule, and fails in the first step where there are no gradients yet.
    """
    if not find_spec("pytorch_optimizer"):
        return {}
    import pytorch_optimizer as peer

    options: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 1e-6}

    def closure_of(model: nn.Module) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            model.zero_grad()
            loss = problem.loss(model)
            loss.backward()
            return loss

        return closure

    def after_first(make: Callable[[nn.Module], Any], cycle: int = 1) -> Step:
        model = problem.model()
        optimizer, closure = make(model), closure_of(model)

        def step() -> None:
            for _ in range(cycle):
                closure()
                optimizer.step(closure)
                optimizer.zero_grad()

        return step

    def wsam() -> Step:
        model = problem.model()
        optimizer, closure = peer.WSAM(model, model.parameters(), **options), closure_of(model)

        def step() -> None:
            optimizer.step(closure)
            optimizer.zero_grad()

        return step

    def gsam() -> Step:
        class Constant:
            def step(self) -> float:
                return 0.05

        model, base = problem.pair()
        schedule: Any = Constant()
        optimizer = peer.GSAM(model.parameters(), base, model=model, rho_scheduler=schedule)
        closure = torch.enable_grad()(closure_of(model))

        def step() -> None:
            pair: Any = lambda: (None, closure())  # noqa: E731 # an output beside the loss
            optimizer.step(pair)
            optimizer.zero_grad()

        return step

    def kind(made: Any, **further: Any) -> Callable[[nn.Module], Any]:
        return lambda model: made(model.parameters(), **options, **further)

    return {
        "SAM": lambda: after_first(kind(peer.SAM)),
        "ASAM": lambda: after_first(kind(peer.SAM, adaptive=True)),
        "FriendlySAM": lambda: after_first(kind(peer.FriendlySAM)),
        "LookSAM": lambda: after_first(kind(peer.LookSAM, k=LOOK), LOOK),
        "GSAM": gsam,
        "WSAM": wsam,
    }


def compare(problem: Problem, names: list[str]) -> Comparison:
    """Methods of the same floor, and their peers."""
    method = METHODS[names[0]]
    others = {f"{PYTORCH_OPTIMIZER}: {name}": make for name, make in peers(problem).items()}
    return Comparison(
        method=", ".join(names),
        passes=f"{method.passes} forward, {method.passes} backward, base step (2R 1W)",
        floor=functools.partial(
            floor, problem, method.passes, method.momentum, method.cycle, method.form
        ),
        ours={name: functools.partial(ours, problem, name) for name in names},
        peers={key: make for key, make in others.items() if key.partition(": ")[2] in names},
        traffic=Traffic((), problem.parameters()),
    )


def groups(most_passes: int) -> list[list[str]]:
    """The methods that need at most so many passes, those of one floor together."""
    by_floor: dict[tuple[int, float, int, bool], list[str]] = {}
    for name, method in METHODS.items():
        if method.passes <= most_passes:
            key = (method.passes, method.momentum, method.cycle, method.form == "domains")
            by_floor.setdefault(key, []).append(name)
    return list(by_floor.values())


def measure_sharpness(
    problem: Problem, clock: Clock, rounds: Rounds, seed: int, *, most_passes: int
) -> list[dict[str, Any]]:
    """A row for each method's ratio to its floor, and one for each peer."""
    rows = []
    for names in groups(most_passes):
        comparison = compare(problem, names)
        print(f"{problem.network}, {problem.case}, {comparison.method}", flush=True)
        summary = summarise(time_in_turn(comparison, clock, rounds), seed)
        for variant, numbers in summary.items():
            if variant == FLOOR:
                continue
            title, _, peer = variant.partition(": ")
            rows.append(
                {
                    "measure": TO_PASSES,
                    "network": problem.network,
                    "case": problem.case,
                    "method": peer or title,
                    "variant": title if peer else VARIANT,
                    "passes": METHODS[peer or title].passes,
                    **numbers,
                }
            )
    return rows


def sharpness_table(rows: list[Row]) -> str:
    """A line for each method, network and case, with its peer where there is one."""
    own = [row for row in rows if row["measure"] == TO_PASSES]
    theirs = {
        (row["network"], row["case"], row["method"]): row
        for row in own
        if row["variant"] != VARIANT
    }

    def line(row: Row) -> tuple[str, ...]:
        peer = theirs.get((row["network"], row["case"], row["method"]))
        return (
            row["network"],
            row["case"],
            row["method"],
            str(row["passes"]),
            f"{row['milliseconds']:.1f}",
            interval(row),
            "" if peer is None else interval(peer),
        )

    head = ("network", "case", "method", "passes", "ms", "ratio", f"{PYTORCH_OPTIMIZER}")
    return table(head, 4, (line(row) for row in own if row["variant"] == VARIANT))
