"""Closures that return no loss, or one that is not finite or cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from faults.case import EACH, Moment, Shape
from faults.kind import Kind, returning, striking, throw
from faults.world import INPUT, Strike, World


def not_backward(shape: Shape) -> bool:
    return not shape.backward


def returns_once(shape: Shape) -> bool:
    return not shape.backward and not shape.form.endswith("generator")


def among_several(fits: Callable[[Shape], bool]) -> Callable[[Shape], bool]:
    """Where there are other objectives; a step without any gradient is no error."""
    return lambda shape: fits(shape) and len(shape.names) > 1


def under_no_grad(world: World, loss: Tensor) -> Tensor:
    with torch.no_grad():
        return world.loss(world.case.victim, 0)


def in_inference_mode(world: World, loss: Tensor) -> Tensor:
    with torch.inference_mode():
        return world.loss(world.case.victim, 0)


def of_frozen(world: World, loss: Tensor) -> Tensor:
    return (world.model.frozen * torch.ones(2, requires_grad=True)).sum()


def reentrant(world: World, loss: Tensor) -> Tensor:
    x = INPUT[0].to(world.case.dtype).clone().requires_grad_()
    scores = checkpoint(world.model.body, x, use_reentrant=True)
    return world.model.head(scores).square().mean()


def reentrant_beside_others(world: World, loss: Tensor) -> Tensor:
    return loss + reentrant(world, loss)


def sparse(world: World, loss: Tensor) -> Tensor:
    return F.embedding(torch.tensor([1]), world.model.head.weight, sparse=True).sum()


def live(world: World) -> object:
    outside = world.model.head.weight
    return striking(world, lambda loss: loss + outside.square().sum())


def backward_and_mapping(world: World, loss: Tensor) -> Tensor:
    loss.backward(retain_graph=True)
    return loss


def freed(world: World, loss: Tensor) -> Tensor:
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss


def graph_from_outside(world: World) -> object:
    """One forward for all, made before the step."""
    scores = world.model.head(INPUT[0].to(world.case.dtype))
    losses = {name: scores.square().sum() * (1 + k) for k, name in enumerate(world.shape.names)}
    return world.optimizer.step({name: lambda n=name: losses[n] for name in losses})


NO_GRADIENT = (
    r"(the closure|the closure of objective {victim}) produced no gradient.*"
    r"\((was it computed under no_grad, .* or kept from an earlier call|is there a return)\?\)"
)
TENSOR = "return the loss as a tensor"
NUMBER = r"a loss is one number: take its mean\(\) or sum\(\)"
REAL = "it must be a real floating-point number"

NO_TENSOR: dict[str, tuple[Callable[[World, Tensor], object], type[Exception], str]] = {
    "a float": (lambda w, loss: loss.item(), TypeError, f"{{victim}} returned a float; {TENSOR}"),
    "a string": (lambda w, loss: "low", TypeError, f"{{victim}} returned a str; {TENSOR}"),
    "a tuple": (
        lambda w, loss: (loss, 1), TypeError, "{victim} returned a tuple; return one loss as a ten"
    ),
    "an array": (
        lambda w, loss: loss.detach().numpy(), TypeError, f"{{victim}} returned a ndarray; {TENSOR}"
    ),
    "an integer tensor": (lambda w, loss: loss.long(), ValueError, f"{{victim}}.*int64; {REAL}"),
    "a bool tensor": (lambda w, loss: loss > 0, ValueError, f"{{victim}}.*torch.bool; {REAL}"),
    "a complex tensor": (lambda w, loss: loss * 1j, ValueError, f"{{victim}}.*complex.*; {REAL}"),
    "a vector": (lambda w, loss: loss.expand(3), ValueError, rf"{{victim}}.*\(3,\); {NUMBER}"),
    "a matrix": (lambda w, loss: loss.expand(2, 2), ValueError, rf"{{victim}}.*\(2, 2\); {NUMBER}"),
    "an empty tensor": (
        lambda w, loss: loss.expand(3)[:0], ValueError, rf"{{victim}}.*\(0,\); {NUMBER}"
    ),
}  # fmt: skip

# A generator's later micro-batch may leave every parameter out.
UNREACHED = {"a loss of inputs only", "a loss of frozen parameters"}
GRADLESS: dict[str, Callable[[World, Tensor], object]] = {
    "None": lambda world, loss: None,
    "a detached loss": lambda world, loss: loss.detach(),
    "a new tensor": lambda world, loss: torch.ones(()),
    "a loss computed under no_grad": under_no_grad,
    "a loss computed in inference mode": in_inference_mode,
    "a loss of inputs only": lambda world, loss: torch.ones((), requires_grad=True) * 2,
    "a loss of frozen parameters": of_frozen,
}

NONFINITE: dict[str, tuple[Callable[[World, Tensor], Tensor], str]] = {
    "a NaN loss": (lambda world, loss: loss * torch.nan, "loss of objective {victim} is nan"),
    "an infinite loss": (lambda world, loss: loss * torch.inf, "loss of objective {victim} is inf"),
    "a loss of -inf": (lambda world, loss: loss * -torch.inf, "loss of objective {victim} is -inf"),
    "a NaN loss with a finite gradient": (
        lambda world, loss: loss + torch.nan, "loss of objective {victim} is nan"
    ),
    "an infinite loss with a finite gradient": (
        lambda world, loss: loss - torch.inf, "loss of objective {victim} is -inf"
    ),
    "a NaN gradient of a finite loss": (
        lambda world, loss: loss + (world.model.head.weight * 0).sqrt().sum(),
        "gradient of objective {victim} is not finite",
    ),
    "an infinite element of a gradient": (
        lambda world, loss: loss + spike(world.model.head.weight),
        "gradient of objective {victim} is not finite",
    ),
    "a negative infinite element of a gradient": (
        lambda world, loss: loss - spike(world.model.head.bias),
        "gradient of objective {victim} is not finite",
    ),
}  # fmt: skip
REMEDY = r".*; nothing was changed\. Look at that objective's data or.*pass nonfinite='skip'"


def spike(weight: Tensor) -> Tensor:
    """Zero, with an infinite gradient in the last element."""
    last = weight.reshape(-1)[-1]
    return (last - last.detach()).sqrt()


class FailsOnNaN(Strike):
    """A NaN loss first; then code that raises where the weights are displaced by NaN."""

    def at(self, moment: Moment, name: str, loss: Tensor | None = None, first: bool = False):
        if name != self._victim or moment != "after" or loss is None:
            return loss
        self._count += 1
        self.struck = self._count == 2
        return loss * torch.nan if self._count == 1 else throw(ValueError("no NaN, please"))


def fail_on_nan(world: World) -> object:
    world.strike = FailsOnNaN(world, lambda loss: loss)
    return world.step(world.strike)


KINDS = [
    *(
        Kind(f"a closure returns {name}", returning(change), error, message)
        for name, (change, error, message) in NO_TENSOR.items()
    ),
    *(
        Kind(
            f"a closure returns {name}",
            returning(change),
            RuntimeError,
            NO_GRADIENT,
            fits=among_several(returns_once if name in UNREACHED else not_backward),
            fixed={"extras": (True,)} if "frozen" in name else {},
            differentiated=True,
            gradless=True,
        )
        for name, change in GRADLESS.items()
    ),
    Kind(
        "a loss on the meta device",
        returning(lambda world, loss: loss.to("meta")),
        (ValueError, RuntimeError),
        "objective {victim}.*device",
        fits=not_backward,
    ),
    Kind(
        "a named closure returns a mapping",
        returning(lambda world, loss: {"x": loss}),
        ValueError,
        "{victim} returned a mapping; pass the closure itself",
        fits=lambda shape: shape.form in EACH,
    ),
    Kind(
        "a closure of several losses returns a mapping in a mapping",
        returning(lambda world, loss: {"x": loss}),
        TypeError,
        f"{{victim}} returned a dict; {TENSOR}",
        fits=lambda shape: shape.joint,
    ),
    *(
        Kind(
            name,
            returning(change),
            gk.NonFiniteError,
            message + REMEDY,
            outcome="nonfinite",
            differentiated=True,
        )
        for name, (change, message) in NONFINITE.items()
    ),
    Kind(
        "a NaN loss that is reported but not differentiated",
        returning(lambda world, loss: loss * torch.nan),
        gk.NonFiniteError,
        "loss of objective 'pseudo' is nan" + REMEDY,
        outcome="nonfinite",
        fits=lambda shape: shape.joint and shape.chain == "grata",
        fixed={"victim": ("pseudo",), "visit": (0,)},
    ),
    Kind(
        "code that fails at weights displaced by NaN",
        fail_on_nan,
        gk.NonFiniteError,
        "loss of objective {victim} is nan" + REMEDY,
        outcome="nonfinite",
        fits=lambda shape: "sam" in shape.chain,
    ),
    Kind(
        "a sparse gradient",
        returning(sparse),
        ValueError,
        "{victim} has a sparse gradient.*make the embedding with sparse=False",
        differentiated=True,
    ),
    Kind(
        "a reentrant checkpoint",
        returning(reentrant),
        RuntimeError,
        "{victim} uses.*pass use_reentrant=False",
        fits=returns_once,
        differentiated=True,
    ),
    Kind(
        "a reentrant checkpoint beside what reaches every parameter",
        returning(reentrant_beside_others),
        RuntimeError,
        "{victim} uses.*pass use_reentrant=False",
        fits=not_backward,
        fixed={"steps": (0,)},
        differentiated=True,
    ),
    Kind(
        "a live parameter captured outside",
        live,
        RuntimeError,
        "'head.weight' by way of a reference made there.*look parameters up in it there, or pass "
        "engine='inplace'",
        fixed={"engine": ("functional",)},
        differentiated=True,
    ),
    Kind(
        "backward and several losses",
        returning(backward_and_mapping),
        RuntimeError,
        "no longer be told apart; return the losses only",
        fits=lambda shape: shape.joint and len(shape.names) > 1,
    ),
    Kind(
        "a graph that is freed already",
        returning(freed),
        RuntimeError,
        "retain_graph=True",
        fits=not_backward,
        differentiated=True,
    ),
    Kind(
        "one graph from outside for several closures (functional)",
        graph_from_outside,
        RuntimeError,
        "the loss was computed outside the closure",
        fits=lambda shape: shape.form in EACH and len(shape.names) > 1,
        fixed={"engine": ("functional",)},
    ),
    Kind(
        "one graph from outside for several closures (inplace)",
        graph_from_outside,
        RuntimeError,
        "modified by an inplace operation|was computed outside the closure",
        fits=lambda shape: shape.form in EACH and len(shape.names) > 1,
        fixed={"engine": ("inplace",)},
    ),
    Kind(
        "a loss of shape [1, 1]",
        returning(lambda world, loss: loss.reshape(1, 1)),
        None,
        outcome="works",
    ),
]
