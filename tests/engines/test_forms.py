"""The forms in which objectives are given come to the same update."""

import weakref

import pytest
import torch
from helpers import flat, relative_error

import gradkit as gk
from engines.networks import (
    ENGINES,
    FORMS,
    WITHOUT_BATCH_STATISTICS,
    as_mapping,
    as_one_closure,
    assert_equal_runs,
    data,
    disagreement,
    error,
    network,
    optimizer_of,
    run,
    shares,
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", sorted(set(FORMS) - {"mapping"}))
@pytest.mark.parametrize("chain", [("PCGrad",), ("SAM", "PCGrad"), ("LookAhead", "CosineLR")])
def test_every_form_gives_the_same_update(engine, form, chain):
    # One closure for both computes "a" at θ already, where a mapping evaluates it ahead only.
    losses = not ("LookAhead" in chain and form in ("one closure", "one generator"))
    for name in WITHOUT_BATCH_STATISTICS:
        runs = [run(name, engine, chain, make, 5) for make in (as_mapping, FORMS[form])]
        assert_equal_runs(*runs, losses=losses, tolerance=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["one closure", "backward closures"])
def test_forms_of_whole_batches_agree_under_batch_norm(engine, form):
    """The statistics differ: one forward for both objectives moves them once, two do twice."""
    runs = [run("batch norm", engine, ("PCGrad",), make, 5) for make in (as_mapping, FORMS[form])]
    assert_equal_runs(*runs, buffers=False, tolerance=1e-11)
    counts = [int(models[0][1].num_batches_tracked) for models, _ in runs]
    assert counts == ([4, 2] if form == "one closure" else [4, 4])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transforms", [(), (gk.SAM,), (gk.PCGrad, gk.SAM)])
def test_every_form_of_one_objective_gives_the_same_update(engine, transforms):
    x, y = data("linear", 0)

    def plain(model, optimizer):
        return lambda: error(model(x), y)

    def backward(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = error(model(x), y)
            loss.backward()
            return loss

        return closure

    def silent(model, optimizer):
        closure = backward(model, optimizer)

        def body():
            closure()

        return body

    def generator(model, optimizer):
        def closure():
            for xs, ys, share in shares(x, y):
                yield share * error(model(xs), ys)

        return closure

    def backward_generator(model, optimizer):
        def closure():
            for xs, ys, share in shares(x, y):
                loss = share * error(model(xs), ys)
                loss.backward()
                yield loss

        return closure

    def accumulating(model, optimizer):
        """Micro-batches inside an ordinary closure, as torch users write them."""

        def closure():
            model.zero_grad()
            total = 0.0
            for xs, ys, share in shares(x, y):
                loss = share * error(model(xs), ys)
                loss.backward()
                total = total + loss.detach()
            return total

        return closure

    def named(model, optimizer):
        return {"loss": plain(model, optimizer)}

    results = []
    for form in (plain, named, backward, silent, generator, backward_generator, accumulating):
        model = network("linear", 1)
        optimizer = gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1),
            *(make() for make in transforms),
            model=model,
            engine=engine,
        )
        loss = optimizer.step(form(model, optimizer))
        assert optimizer.last_step.names == ("loss",)
        assert loss.isnan() if form is silent else float(loss) > 0
        results.append((flat(model.parameters()), loss, optimizer.last_step.gram))
    for weights, loss, gram in results:
        assert relative_error(weights, results[0][0]) < 1e-13
        assert relative_error(gram, results[0][2]) < (1e-6 if loss.isnan() else 1e-12)
        if not loss.isnan():
            assert relative_error(loss, results[0][1]) < 1e-13


class Held:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["generators", "one generator", "backward generators"])
def test_a_micro_batch_is_freed_before_the_next(engine, form):
    model = network("linear")
    optimizer, _ = optimizer_of(model, gk.PCGrad(), gk.SAM(), engine=engine)
    held, left = weakref.WeakSet(), []

    def pack(tensor):
        kept = Held(tensor)
        held.add(kept)
        return kept

    def watched(generator):
        def body():
            for item in generator():
                assert held or "backward" in form
                yield item
                del item
                left.append(len(held))

        return body

    objectives = FORMS[form](model, optimizer, *data("linear", 0))
    if isinstance(objectives, dict):
        objectives = {name: watched(generator) for name, generator in objectives.items()}
    else:
        objectives = watched(objectives)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        optimizer.step(objectives)
    assert left == [0] * (6 if form == "one generator" else 12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_cannot_call_backward_on_several_losses(engine):
    model = network("linear")
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine)
    x, y = data("linear", 0)

    def closure():
        losses = {"a": error(model(x), y), "b": disagreement(model(x), y)}
        sum(losses.values()).backward()
        return losses

    before = flat(model.parameters())
    with pytest.raises(RuntimeError, match="called backward and returned several losses"):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_a_closure_recorded_are_detached(engine):
    model = torch.nn.Linear(3, 1, bias=False).double()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine)

    def cubic(factor):
        def closure():
            loss = factor * model.weight.pow(3).sum()
            loss.backward(create_graph=True)
            return loss

        return closure

    for _ in range(2):  # the second step takes the memory of the first
        before = model.weight.detach().clone()
        optimizer.step({"a": cubic(1.0), "b": cubic(2.0)})
        assert torch.allclose(model.weight, before - 0.1 * 9 * before.square(), rtol=1e-14)
        assert not model.weight.grad.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_named_objectives_are_evaluated(engine):
    model = network("linear")
    optimizer, _ = optimizer_of(model, engine=engine)
    x, y = data("linear", 0)

    def never():
        raise AssertionError("not asked for")

    closures = as_mapping(model, optimizer, x, y)
    both = optimizer.gradients(closures)
    one = optimizer.gradients({**closures, "a": never}, only=["b"])
    assert one.names == ("b",)
    assert torch.equal(one.rows, both.rows[1:])
    joint = optimizer.gradients(as_one_closure(model, optimizer, x, y), only=["b"])
    assert joint.names == ("b",)
    assert relative_error(joint.rows, one.rows) < 1e-14
    with pytest.raises(ValueError, match="there is no objective 'c'; there are 'a', 'b'"):
        optimizer.gradients(closures, only=["c"])
