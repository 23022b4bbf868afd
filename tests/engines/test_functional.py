"""What the functional engine alone promises and refuses."""

import weakref

import pytest
import torch
from helpers import flat

import gradkit as gk
from engines.networks import data, error, network, optimizer_of


def test_the_functional_engine_never_writes_to_the_weights():
    model = network("batch norm")
    optimizer, _ = optimizer_of(model, gk.SAM(rho=1.0), engine="functional", lr=0.0)
    x, y = data("batch norm", 0)
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    seen, live = [], list(model.parameters())

    def closure():
        assert all(a is not b for a, b in zip(model.parameters(), live, strict=True))
        seen.append(flat(model.parameters()))
        return error(model(x), y)

    optimizer.gradients(closure)
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    optimizer.step(closure)
    assert not torch.equal(seen[1], seen[2])  # SAM's second point


@pytest.mark.parametrize("kind", ["loss", "backward"])
def test_a_cached_parameter_list_is_refused_by_name(kind):
    model = network("linear")
    optimizer, _ = optimizer_of(model, gk.SAM(), engine="functional")
    x, y = data("linear", 0)
    cached = list(model.parameters())
    before = flat(model.parameters())

    def closure():
        loss = error(model(x), y) + cached[2].square().sum()
        if kind == "backward":
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"depends on the parameter '2\.weight'.*inplace"):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_evaluation_leaves_no_displaced_weights_behind():
    seen = []

    class Ahead(gk.Transform):
        def around(self, inner, context):
            def oracle(at=None, only=None):
                ones = torch.ones(context.layout.numel)
                gradients = inner(context.displaced(at, ones, 1.0), only)
                assert seen[-1]() is None
                return gradients

            return oracle

    model = torch.nn.Linear(2, 1)

    def closure():
        seen.append(weakref.ref(model.weight))
        return model(torch.ones(1, 2)).sum()

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    gk.wrap(base, Ahead(), model=model, engine="functional").step(closure)
    assert len(seen) == 1
