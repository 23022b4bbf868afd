"""What is passed to `step`, `gradients` and the closures' mappings, and where they are called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

import gradkit as gk
from faults.case import EACH, JOINT, NEEDED, ONE, Shape
from faults.kind import Kind, stepping
from faults.world import INPUT, World


def needs_names(shape: Shape) -> bool:
    return shape.chain in NEEDED


def twice_jointly(shape: Shape) -> bool:
    return shape.visits == 2 and shape.joint and shape.chain not in NEEDED


def missing(world: World) -> object:
    """Step without an objective that the chain needs."""
    needed = NEEDED[world.shape.chain]
    lost = needed[world.case.choice % len(needed)]
    return world.step(names=[name for name in world.shape.names if name != lost])


def renamed(world: World) -> object:
    """Step with names that the chain does not know."""
    objectives = world.objectives()
    if callable(objectives):
        return world.optimizer.step(
            lambda: {f"my {k}": world.loss(k, 0) for k in world.shape.names}
        )
    return world.optimizer.step({f"my {name}": loss for name, loss in objectives.items()})


def named(name: object) -> Callable[[World], object]:
    """One objective of this name."""

    def provoke(world: World) -> object:
        first = world.shape.names[0]
        if world.shape.joint:
            return world.optimizer.step(lambda: {name: world.loss(first, 0)})
        return world.optimizer.step({name: lambda: world.loss(first, 0)})

    return provoke


def changing(change: Callable[[tuple[str, ...]], list[str]]) -> Callable[[World], object]:
    """A joint closure whose names are others at the second evaluation."""

    def provoke(world: World) -> object:
        names = world.shape.names
        closures = iter([world.objectives(), world.objectives(names=change(names))])
        return world.optimizer.step(lambda: next(closures)())

    return provoke


def changing_within(world: World) -> object:
    """A generator whose second micro-batch has other names."""
    names = world.shape.names

    def closure() -> Iterator[object]:
        yield {name: world.loss(name, 0) for name in names}
        yield {name: world.loss(name, 1) for name in names[1:]}

    return world.optimizer.step(closure)


def empty_the_second_time(world: World) -> object:
    closures = itertools.chain([world.objectives()], itertools.repeat(dict))
    return world.optimizer.step(lambda: next(closures)())


def yielding_nothing(world: World) -> object:
    """One of the closures is a generator that yields nothing."""
    empty = lambda: (x for x in ())  # noqa: E731 # used twice
    objectives = world.objectives()
    return world.optimizer.step(
        empty if callable(objectives) else {**objectives, world.case.victim: empty}
    )


def exhausted(world: World) -> object:
    """The same generator object again, where a new one is needed."""
    objectives = world.objectives()
    if callable(objectives):
        made = objectives()
        return world.optimizer.step(lambda: made)
    made = objectives[world.case.victim]()
    return world.optimizer.step({**objectives, world.case.victim: lambda: made})


def spoiling(value: object) -> Callable[[World], object]:
    """A mapping with something else in place of a closure."""
    return lambda world: world.optimizer.step({**world.objectives(), world.case.victim: value})


def inside(block: Callable[[], object]) -> Callable[[World], object]:
    def provoke(world: World) -> object:
        with block():
            return world.step()

    return provoke


def without_closure(world: World) -> object:
    return world.optimizer.step()


def stored(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[World], object]:
    """Gradients of the user's own, one of which is spoilt."""

    def prepare(world: World) -> Callable[[], object]:
        weight = world.model.head.weight
        good, weight.grad = weight.grad, spoil(weight.grad)

        def repair() -> None:
            weight.grad = good

        return repair

    return prepare


def at(size: int) -> Callable[[World], object]:
    """`gradients` at a displacement that is too long or too short by so much."""

    def provoke(world: World) -> object:
        count = sum(p.numel() for p in world.model.parameters() if p.requires_grad)
        count -= sum(p.numel() for p in world.outside)
        point = torch.zeros(count + size, dtype=world.case.dtype)
        return world.optimizer.gradients(world.objectives(), at=point)

    return provoke


def gradients_at_random(world: World) -> object:
    """No fault, and no trace but the random numbers."""
    count = sum(p.numel() for p in world.model.parameters() if p.requires_grad)
    count -= sum(p.numel() for p in world.outside)
    return world.optimizer.gradients(world.objectives(), at=torch.randn(count).to(world.case.dtype))


def raising_in_gradients(world: World) -> object:
    world.error = KeyboardInterrupt("bad")
    scores = world.model

    def closure() -> object:
        scores(INPUT[0].to(world.case.dtype))
        raise world.error

    return world.optimizer.gradients({"a": closure})


RANDOM = frozenset({"random numbers"})
IN_EACH = {"fits": lambda shape: shape.form in EACH}

KINDS = [
    Kind("an empty mapping", stepping({}), ValueError, "is empty; give it one closure per name"),
    Kind(
        "a closure returns an empty mapping",
        stepping(dict),
        ValueError,
        "returned an empty mapping of losses",
    ),
    Kind("a name that is a number", named(1), TypeError, "1; names are strings",
         fits=lambda shape: shape.form in (*EACH, "joint")),
    Kind("a name that is None", named(None), TypeError, "None; names are strings",
         fits=lambda shape: shape.form in (*EACH, "joint")),
    Kind("a number for an objective", spoiling(3), TypeError,
         r'{victim} is a int, not a closure; pass .* {"\w+": lambda: criterion', **IN_EACH),
    Kind("a loss for an objective", spoiling(torch.ones(())), TypeError,
         r'{victim} is a Tensor, not a closure; pass .* {"\w+": lambda: criterion', **IN_EACH),
    Kind("None for an objective", spoiling(None), TypeError, "not a closure; pass", **IN_EACH),
    Kind("step(number)", stepping(3), TypeError, r"not a int; pass a function that runs the model"),
    Kind("step(loss)", stepping(torch.ones(())), TypeError,
         r"not a Tensor; pass a function that runs the model and returns the loss"),
    Kind("step(list of closures)", stepping([lambda: torch.ones(())]), TypeError,
         r'not a list; give each objective a name: step\({"a": first'),
    Kind("step(generator)", lambda world: world.optimizer.step(world.objectives()()), TypeError,
         r"not a generator; pass the generator function itself",
         fits=lambda shape: shape.form in ("one-generator", "joint-generator")),
    Kind("a closure that needs an argument", stepping(lambda model: model), TypeError,
         "missing 1 required positional argument"),
    Kind("an objective is missing", missing, ValueError,
         r"needs the objective '\w+', but the step has .*; pass step\(\) a mapping of named",
         fits=needs_names),
    Kind("wrong names", renamed, ValueError,
         r"needs the objective '\w+', but the step has 'my .*; pass step\(\) a mapping of named",
         fits=needs_names),
    Kind("one unnamed closure where names are needed",
         lambda world: world.optimizer.step(lambda: world.loss(world.shape.names[0], 0)),
         ValueError, r"but the step has 'loss'; pass step\(\) a mapping of named",
         fits=needs_names),
    Kind("an objective less at the second evaluation", changing(lambda n: [*n[1:]] or ["new"]),
         ValueError, "in the same step; return the same ones each time", fits=twice_jointly),
    Kind("an objective more at the second evaluation", changing(lambda n: [*n, "new"]),
         ValueError, "in the same step; return the same ones each time", fits=twice_jointly),
    Kind("an objective renamed at the second evaluation", changing(lambda n: [*n[1:], "new"]),
         ValueError, "in the same step; return the same ones each time", fits=twice_jointly),
    Kind("no objective at the second evaluation", empty_the_second_time, ValueError,
         "returned an empty mapping of losses", fits=twice_jointly),
    Kind("an objective less in the second micro-batch", changing_within, ValueError,
         "in the same step; return the same ones each time",
         fits=lambda shape: shape.joint and len(shape.names) > 1),
    Kind("a generator that yields nothing", yielding_nothing, RuntimeError,
         r"(the closure|objective {victim}).* produced no gradient: its generator yielded nothing",
         fits=lambda shape: len(shape.names) > 1 and not shape.joint, gradless=True),
    Kind("an exhausted generator", exhausted, RuntimeError,
         r"(the closure|objective {victim}).* produced no gradient: its generator yielded nothing",
         fits=lambda shape: shape.form.endswith("generator") and "sam" in shape.chain,
         gradless=True),
    Kind("inference mode", inside(torch.inference_mode), RuntimeError,
         r"leave that block, or use torch.no_grad\(\)"),
    Kind("under no_grad", inside(torch.no_grad), None, outcome="works"),
    Kind("with gradients switched off", inside(lambda: torch.set_grad_enabled(False)), None,
         outcome="works"),
    Kind("under anomaly detection", inside(lambda: torch.autograd.set_detect_anomaly(True)), None,
         outcome="works"),
    Kind("no closure, but other weights are needed", without_closure, RuntimeError,
         r"evaluates the loss at other weights too: pass step\(\) a closure",
         fits=lambda shape: "sam" in shape.chain, fixed={"grads": ("some", "all")}),
    Kind("no closure, but names are needed", without_closure, ValueError,
         r"needs the objective '\w+', but the step has 'loss'; pass step\(\) a mapping of named",
         fits=needs_names, fixed={"grads": ("some", "all")}),
    Kind("no closure and no gradients", without_closure, None, outcome="unchanged",
         but=frozenset({"record of the last step"}),
         fixed={"grads": ("cleared",)}),
    Kind("no closure and a NaN among the gradients", without_closure, gk.NonFiniteError,
         "gradient of objective 'loss' is not finite; nothing was changed.*nonfinite='skip'",
         outcome="nonfinite", fits=lambda shape: not needs_names(shape), fixed={"grads": ("all",)},
         prepare=stored(lambda grad: grad.clone().index_fill_(0, torch.tensor(0), torch.nan))),
    Kind("no closure and a sparse gradient", without_closure, ValueError,
         "sparse gradient.*make the embedding with sparse=False",
         fits=lambda shape: not needs_names(shape), fixed={"grads": ("all",)},
         prepare=stored(torch.Tensor.to_sparse)),
    Kind("gradients() at a displacement too long", at(+1), ValueError, "displacement|at",
         but=RANDOM),
    Kind("gradients() at a displacement too short", at(-1), ValueError, "displacement|at",
         but=RANDOM),
    Kind("gradients() of an unknown objective",
         lambda world: world.optimizer.gradients(world.objectives(), only=["unknown"]),
         ValueError, "there is no objective 'unknown'; there are '", but=RANDOM,
         fits=lambda shape: shape.form in (*EACH, *JOINT)),
    Kind("gradients() of an unknown objective of a single closure",
         lambda world: world.optimizer.gradients(world.objectives(), only=["unknown"]),
         ValueError, "there is no objective 'unknown'; there are '", but=RANDOM,
         fits=lambda shape: shape.form in ONE),
    Kind("gradients() of nothing", lambda world: world.optimizer.gradients({}), ValueError,
         "is empty; give it one closure per name"),
    Kind("gradients() of a closure that raises", raising_in_gradients, KeyboardInterrupt, "bad",
         but=RANDOM),
    Kind("gradients() elsewhere", gradients_at_random, None, outcome="unchanged", but=RANDOM),
]  # fmt: skip
