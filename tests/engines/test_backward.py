"""Large gradients go into their rows while the backward pass that makes them goes on."""

import pytest
import torch
from helpers import seeded
from torch import nn

import gradkit as gk
from gradkit.core import flat

ENGINES = ("functional", "inplace")


class Network(nn.Module):
    """Large and small parameters, shared ones, and some that one objective alone reaches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.inside = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        features = self.first(x)
        for _ in range(2):
            features = torch.tanh(self.inside(features))
        return [head(features) for head in self.heads]


def network():
    torch.manual_seed(0)
    model = Network().double()
    return model, torch.randn(8, 4, generator=seeded(1), dtype=torch.float64)


def wrapped(model, engine, *transforms):
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return gk.wrap(base, *transforms, model=model, engine=engine)


def losses(model, x):
    a, b = model(x)
    return {"a": a.square().mean(), "b": (b - 1).square().mean()}


def rows_by_hand(model, *batches):
    """One gradient a row, of the losses added up over batches."""
    parameters, rows = list(model.parameters()), []
    for name in ("a", "b"):
        total = sum(losses(model, x)[name] for x in batches)
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
        flat_parts = [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
        rows.append(torch.cat(flat_parts))
    return torch.stack(rows)


def left_over(model):
    return [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks]


@pytest.mark.parametrize("large", [1, 4, 10**6])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["joint", "mapping", "own backward"])
def test_rows_are_those_of_autograd(monkeypatch, engine, large, form):
    monkeypatch.setattr(flat, "LARGE", large)
    model, x = network()
    expected = rows_by_hand(model, x)

    def own_backward(name):
        assert left_over(model) == []  # of the first objective's pass, on the same leaves
        loss = losses(model, x)[name]
        loss.backward()
        return loss

    objectives = {
        "joint": lambda: losses(model, x),
        "mapping": {name: lambda name=name: losses(model, x)[name] for name in ("a", "b")},
        "own backward": {
            "a": lambda: losses(model, x)["a"],
            "b": lambda: own_backward("b"),
        },
    }[form]
    gradients = wrapped(model, engine).gradients(objectives)
    assert torch.equal(gradients.rows, expected)
    names = [name for name, _ in model.named_parameters()]
    for row, mine in zip(gradients.reached, ("0", "1"), strict=True):
        reached = {name for name, flag in zip(names, row, strict=True) if flag}
        assert reached == {
            name
            for name in names
            if not name.startswith(("unused", "heads")) or name.startswith(f"heads.{mine}")
        }
    assert left_over(model) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_add_up(engine):
    model, x = network()

    def parts():
        for some in x.split(2):
            yield losses(model, some)

    def alone():
        for some in x.split(2):
            yield losses(model, some)["a"]

    expected = rows_by_hand(model, *x.split(2))
    torch.testing.assert_close(wrapped(model, engine).gradients(parts).rows, expected)
    torch.testing.assert_close(wrapped(model, engine).gradients(alone).rows, expected[:1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_is_taken_before_the_next_is_made(engine):
    model, x = network()
    seen = []

    def look(grad):
        seen.append([p.grad is None for name, p in model.named_parameters() if "bias" in name])

    def closure():
        features = model.first(x)
        features.register_hook(look)  # the later layers' gradients are there by now
        inside = torch.tanh(model.inside(features))
        return {"a": model.heads[0](inside).mean(), "b": model.heads[1](inside).mean()}

    wrapped(model, engine).gradients(closure)
    # Of `first`, `inside`, the heads and `unused`; two numbers, a head's bias, are not many.
    assert seen == [[True, True, False, True, True], [True, True, True, False, True]]


def test_a_parameters_own_hooks_find_its_gradient():
    model, x = network()
    expected = rows_by_hand(model, x)
    start = sum(p.numel() for p in model.first.parameters())
    weight = model.inside.weight
    inside = slice(start, start + weight.numel())
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]

    def halve(*ignored):
        weight.grad.mul_(0.5)

    # After the gradient has been added to `.grad`, and when all that follows it is done.
    handles = [weight.register_post_accumulate_grad_hook(halve), node.register_hook(halve)]
    gradients = wrapped(model, "inplace").gradients(lambda: losses(model, x))
    expected[:, inside] /= 4
    assert torch.equal(gradients.rows, expected)
    assert left_over(model) == ["inside.weight"]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [KeyError("backward"), KeyboardInterrupt()])
def test_a_backward_pass_that_fails_half_way_leaves_nothing(engine, error):
    model, x = network()
    optimizer = wrapped(model, engine, gk.PCGrad())
    optimizer.step(lambda: losses(model, x))
    grads = [parameter.grad for parameter in model.parameters()]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    passes = []

    def fail(grad):
        passes.append(grad)
        if len(passes) == 2:  # the second objective's; the first is in its row already
            raise error

    def closure():
        features = model.first(x)
        features.register_hook(fail)
        inside = model.inside(features)
        return {"a": model.heads[0](inside).mean(), "b": model.heads[1](inside).mean()}

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert left_over(model) == []
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(parameter, value)
    optimizer.step(lambda: losses(model, x))


def inside(w):
    return torch.tanh(w).square().sum()


class ByGrad(torch.autograd.Function):
    """w ↦ Σ tanh(w)², whose backward differentiates it by two passes inside the outer one."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return inside(w)

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        with torch.enable_grad():
            # Both are kept: neither may be written over by the other, or taken for the whole.
            first, second = (torch.autograd.grad(inside(w) / 2, w)[0] for _ in range(2))
        return grad * (first + second)


class ByBackward(ByGrad):
    """The same by `backward`, which puts the inner gradient where the outer one is to be."""

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        before, w.grad = w.grad, None
        with torch.enable_grad():
            inside(w).backward(create_graph=False)
        found, w.grad = w.grad, before
        return grad * found


class Reversible(ByGrad):
    """The same, and the inner pass itself adds to the parameter's gradient."""

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        with torch.enable_grad():
            (grad * inside(w)).backward()
        return


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", [ByGrad, ByBackward, Reversible])
@pytest.mark.parametrize("first", [True, False])
def test_passes_inside_the_backward_pass(engine, function, first):
    model, x = network()

    def closure(apply=function.apply):
        found = losses(model, x)
        extra = apply(model.inside.weight)
        return {**found, "b": extra + found["b"] if first else found["b"] + extra}

    w = model.inside.weight
    expected = [
        torch.autograd.grad(loss, w, retain_graph=True)[0].flatten()
        for loss in closure(inside).values()
    ]
    rows = wrapped(model, engine).gradients(closure).rows
    start = sum(p.numel() for p in model.first.parameters())
    torch.testing.assert_close(rows[:, start : start + w.numel()], torch.stack(expected))


class Recomputed(torch.autograd.Function):
    """A layer whose parameters the outer pass does not know of, as in reversible networks."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.x, ctx.layer = x, layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            ctx.layer(x).backward(grad)
        return x.grad, None


@pytest.mark.parametrize("large", [1, 10**6])
@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_that_only_an_inner_pass_reaches(monkeypatch, engine, large):
    monkeypatch.setattr(flat, "LARGE", large)
    model, x = network()

    def closure(apply=lambda features, layer: layer(features)):
        features = torch.tanh(apply(model.first(x), model.inside))
        return {"a": model.heads[0](features).mean(), "b": model.heads[1](features).mean()}

    optimizer = wrapped(model, engine)
    expected = optimizer.gradients(closure).rows.clone()
    rows = optimizer.gradients(lambda: closure(Recomputed.apply)).rows
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_that_a_closure_freezes_is_left_alone_or_an_error(engine):
    model, x = network()
    optimizer = wrapped(model, engine, gk.PCGrad())

    def closure():
        found = losses(model, x)
        model.inside.weight.requires_grad_(False)
        return found

    if engine == "functional":
        with pytest.raises(RuntimeError, match="requires_grad"):
            optimizer.step(closure)
        assert model.inside.weight.requires_grad
        assert left_over(model) == []
    else:
        before = model.inside.weight.detach().clone()
        optimizer.step(closure)
        assert torch.equal(model.inside.weight, before)
        assert model.inside.weight.grad is None
        model.inside.weight.requires_grad_(True)
    optimizer.step(lambda: losses(model, x))
    assert optimizer.last_step.applied


@pytest.mark.parametrize("engine", ENGINES)
def test_old_rows_stay_as_they_were(engine):
    model, x = network()
    optimizer = wrapped(model, engine)
    first = optimizer.gradients(lambda: losses(model, x))
    before = first.rows.clone()
    optimizer.gradients(lambda: losses(model, 2 * x))
    assert torch.equal(first.rows, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sparse_gradient_is_an_error_and_nothing_is_lost(engine):
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = wrapped(table, engine, gk.PCGrad())
    before = table.weight.detach().clone()

    def closure():
        rows = table(torch.tensor([1, 2]))
        return {"a": rows.sum(), "b": rows.square().sum()}

    with pytest.raises(ValueError, match="'a' has a sparse gradient"):
        optimizer.step(closure)
    assert table.weight.grad is None
    assert torch.equal(table.weight, before)
