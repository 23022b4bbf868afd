"""Objectives that are weighed before they are back-propagated, without a row for each."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers import as_users_run_it, counted, relative_error, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from gradkit.engines.stream import streamed_gram

ENGINES = ("functional", "inplace")
NAMES = ("a", "b", "c")


class ByLosses(gk.Reweighing):
    """Weighs objectives by their losses, as loss weightings do."""

    needs_rows = False

    def weigher(self, context):
        return lambda gradients: gradients.reweighted(1 / (1 + gradients.losses.abs()))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


def losses_of(model, x):
    y = model(x)
    return {
        "a": y[:, 0].square().mean(),
        "b": (y[:, 1] - 2 * y[:, 0]).square().mean(),
        "c": (y[:, 2] + y[:, 0] * y[:, 1]).mean(),
    }


def batches(count):
    generator = seeded(3)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def train(transforms, rows, engine, steps=4, **options):
    model = network()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        *(transforms(model) if callable(transforms) else transforms),
        model=model,
        engine=engine,
        rows=rows,
        **options,
    )
    torch.manual_seed(1)
    returned = [optimizer.step(lambda x=x: losses_of(model, x)) for x in batches(steps)]
    state = torch.cat([value.reshape(-1).double() for value in model.state_dict().values()])
    return state, torch.stack(returned), optimizer.last_step


CHAINS = {
    "PCGrad": lambda model: (gk.PCGrad(),),
    "Mean, PCGrad": lambda model: (gk.Mean(), gk.PCGrad()),
    "PCGrad, SAM": lambda model: (gk.PCGrad(), gk.SAM(rho=0.1)),
    "PCGrad, EMA": lambda model: (gk.PCGrad(), gk.EMA(model, decay=0.9)),
    "by losses, PCGrad": lambda model: (ByLosses(), gk.PCGrad()),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_streamed_step_equals_one_that_keeps_rows(chain, engine):
    kept, losses, record = train(CHAINS[chain], "keep", engine)
    streamed, others, other = train(CHAINS[chain], "stream", engine)
    assert relative_error(streamed, kept) < 1e-12
    torch.testing.assert_close(others, losses)
    assert other.names == record.names == NAMES
    torch.testing.assert_close(other.gram, record.gram)
    torch.testing.assert_close(other.weights, record.weights)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "chain", [(), (gk.SAM(rho=0.1),), (ByLosses(),)], ids=("nothing", "SAM", "by losses")
)
def test_without_a_rule_there_is_one_backward_pass_and_no_gram_matrix(chain, engine):
    kept, _, _ = train(copy.deepcopy(chain), "keep", engine)
    streamed, _, record = train(copy.deepcopy(chain), "stream", engine)
    assert relative_error(streamed, kept) < 1e-12
    assert record.gram.isnan().all()
    assert record.cosine("a", "b").isnan()


def passes(transforms, rows, engine="functional"):
    weight = nn.Parameter(torch.ones(2))
    model = nn.Module()
    model.weight = weight
    counts = {"forward": 0, "backward": 0}
    optimizer = gk.wrap(
        torch.optim.SGD([weight], lr=0.1), *transforms, model=model, engine=engine, rows=rows
    )

    def closure():
        value = counted(model.weight, counts)
        return {"a": value.sum(), "b": value.square().sum(), "c": value.prod()}

    optimizer.step(closure)
    return counts["forward"], counts["backward"]


@pytest.mark.parametrize("engine", ENGINES)
def test_weighing_by_losses_costs_one_backward_pass(engine):
    assert passes((ByLosses(),), "auto", engine) == (1, 1)
    assert passes((ByLosses(),), "keep", engine) == (1, 3)
    assert passes((ByLosses(), gk.SAM()), "auto", engine) == (2, 2)
    # Whoever looks at single gradients gets them.
    assert passes((ByLosses(), gk.CosineLR("a", "b")), "auto", engine) == (1, 3)
    assert passes((ByLosses(), gk.PCGrad()), "auto", engine) == (1, 3)
    assert passes((gk.PCGrad(),), "auto", engine) == (1, 3)
    assert passes((gk.Sum(),), "stream", engine)[0] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_auto_keeps_rows_where_losses_come_one_after_the_other(engine):
    """The same step from one closure for each objective, and from micro-batches."""
    results = []
    (x,) = batches(1)
    for form in ("joint", "mapping", "generator"):
        model = network().eval()
        optimizer = gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), ByLosses(), model=model, engine=engine
        )

        def generator(model=model):
            yield losses_of(model, x)

        forms = {
            "joint": lambda model=model: losses_of(model, x),
            "mapping": {n: lambda n=n, model=model: losses_of(model, x)[n] for n in NAMES},
            "generator": generator,
        }
        optimizer.step(forms[form])
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert optimizer.last_step.gram.isnan().all() == (form == "joint")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def closures_that_cannot_stream(model, x):
    def generator():
        yield losses_of(model, x)

    def backward():
        losses = losses_of(model, x)
        sum(losses.values()).backward()
        return losses

    return {
        "a mapping": ({n: lambda n=n: losses_of(model, x)[n] for n in NAMES}, "needs all losses"),
        "a generator": (generator, "needs all losses"),
        "own backward": (backward, "called backward and returned several losses"),
        "a constant": (
            lambda: {**losses_of(model, x), "c": torch.zeros(())},
            "objective 'c' produced no gradient",
        ),
        "nothing": (dict, "empty mapping"),
        "no loss": (lambda: {**losses_of(model, x), "b": None}, "objective 'b' produced no grad"),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", closures_that_cannot_stream(None, None))
def test_what_cannot_stream_is_refused_and_nothing_is_lost(kind, engine):
    model = network()
    (x,) = batches(1)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        gk.PCGrad(),
        model=model,
        engine=engine,
        rows="stream",
    )
    optimizer.step(lambda: losses_of(model, x))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    group = copy.deepcopy(optimizer.state_dict()["param_groups"])
    grads = [parameter.grad for parameter in model.parameters()]
    draws = torch.get_rng_state()
    closure, message = closures_that_cannot_stream(model, x)[kind]
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step(closure)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert optimizer.state_dict()["param_groups"] == group
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), draws)


def test_what_looks_at_single_gradients_cannot_follow():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for last in (gk.CosineLR("a", "b"), gk.LookAhead("a", "b"), gk.PCGrad(scope="tensor")):
        with pytest.raises(ValueError, match="keeps no objective's own gradient"):
            gk.wrap(base, gk.Mean(), last, model=model, rows="stream")
    with (
        as_users_run_it(),
        pytest.raises(ValueError, match="rows is 'few'; choose one of auto, keep, stream"),
    ):
        gk.wrap(base, rows="few")


class Reads(gk.Transform):
    """Looks at the direction of what it gets, in one way or another."""

    needs_rows = False

    def __init__(self, how):
        self.how = how
        self.seen = []

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            assert gradients.has_update
            if self.how == "update":
                self.seen.append(gradients.update.clone())
            elif self.how == "parts":
                self.seen.append(torch.cat([part.reshape(-1) for part in gradients.parts]))
            elif self.how == "norm":
                self.seen.append(gradients.direction_norm())
            elif self.how == "another":
                return gradients.replace(update=-gradients.update)
            elif self.how == "scale":
                return gradients.replace(lr_scale=gradients.lr_scale / 2)
            return gradients

        return oracle


class Sizes(TorchDispatchMode):
    """How many numbers memory is asked for; short vectors that are joined for a norm apart."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.zeros):
            self.seen.add(result.numel())
        return result


@pytest.mark.parametrize("engine", ENGINES)
def test_the_one_gradient_is_made_flat_only_for_those_who_ask(engine):
    model = network()
    length = sum(parameter.numel() for parameter in model.parameters())
    found = {}
    for how in ("nothing", "parts", "norm", "scale", "update", "another"):
        reader = Reads(how)
        with Sizes() as sizes:
            state, _, _ = train((ByLosses(), reader), "auto", engine, steps=1)
        assert (length in sizes.seen) == (how in ("update", "another")), how
        found[how] = state, reader.seen
    weights = dict(model.named_parameters())
    chosen = torch.cat(
        [torch.full_like(v.reshape(-1), n in weights).bool() for n, v in model.state_dict().items()]
    )
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    steps = {how: state[chosen] - start for how, (state, _) in found.items()}
    step = steps["nothing"]
    for how, factor in (("parts", 1), ("norm", 1), ("update", 1), ("another", -1), ("scale", 0.5)):
        assert relative_error(steps[how], factor * step) < 1e-12
    (flat,), (parts,), (norm,) = (found[how][1] for how in ("update", "parts", "norm"))
    assert relative_error(flat, -step / 0.1) < 1e-12
    assert torch.equal(parts, flat)
    assert relative_error(norm, flat.norm()) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "chain",
    [(), (ByLosses(),), (gk.UW(),), (gk.UW(), gk.SAM()), (gk.PCGrad(),)],
    ids=lambda chain: " ".join(type(transform).__name__ for transform in chain),
)
def test_a_step_does_not_keep_its_gradients_alive(chain, engine):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = "auto" if chain and not isinstance(chain[0], gk.PCGrad) else "stream"
    optimizer = gk.wrap(base, *copy.deepcopy(chain), model=model, engine=engine, rows=rows)
    kept = []
    enabled = gc.isenabled()
    gc.disable()  # no reference cycle is to need it
    try:
        for x in batches(4):
            optimizer.step(lambda x=x: losses_of(model, x))
            kept += [weakref.ref(parameter.grad) for parameter in model.parameters()]
        optimizer.zero_grad()
        assert not any(ref() is not None for ref in kept)
    finally:
        if enabled:
            gc.enable()


def test_no_rows_can_be_looked_at():
    class Looks(gk.Transform):
        needs_rows = False

        def around(self, inner, context):
            return lambda at=None, only=None: inner(at, only).observe("a").rows

    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, Looks(), model=model, rows="stream")
    with pytest.raises(RuntimeError, match="not taken one by one in this step"):
        optimizer.step(lambda: losses_of(model, batches(1)[0]))
    # Outside a step the objectives' own gradients are there as ever.
    assert optimizer.gradients(lambda: losses_of(model, batches(1)[0])).rows.shape[0] == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_observers_are_not_back_propagated(engine):
    class Observes(gk.Reweighing):
        needs_rows = False

        def weigher(self, context):
            return lambda gradients: gradients.observe("b")

    kept, _, _ = train((Observes(), gk.PCGrad()), "keep", engine)
    streamed, _, record = train((Observes(), gk.PCGrad()), "stream", engine)
    assert relative_error(streamed, kept) < 1e-12
    assert float(record.weights[1]) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_is_named(engine):
    model = network()
    (x,) = batches(1)

    def closure():
        losses = losses_of(model, x)
        return {**losses, "b": losses["b"] * torch.inf}

    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), ByLosses(), model=model, engine=engine
    )
    with pytest.raises(gk.NonFiniteError, match="the loss of objective 'b' is inf"):
        optimizer.step(closure)
    optimizer.options.nonfinite = "skip"
    before = copy.deepcopy(model.state_dict())
    optimizer.step(closure)
    assert not optimizer.last_step.applied
    torch.testing.assert_close(dict(model.named_parameters()), {
        name: before[name] for name, _ in model.named_parameters()
    })  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_scaled_losses_give_the_same_step(engine):
    kept, _, record = train((gk.PCGrad(), gk.SAM(0.1)), "keep", engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    streamed, _, other = train((gk.PCGrad(), gk.SAM(0.1)), "stream", engine, scaler=scaler)
    assert relative_error(streamed, kept) < 1e-12
    torch.testing.assert_close(other.gram, record.gram)


@pytest.mark.parametrize("engine", ENGINES)
def test_activations_may_be_computed_again(engine):
    results = []
    for rows in ("keep", "stream"):
        model = network().eval()
        optimizer = gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1),
            gk.PCGrad(),
            model=model,
            engine=engine,
            rows=rows,
        )
        (x,) = batches(1)
        optimizer.step(lambda: losses_of(lambda x: checkpoint(model, x, use_reentrant=False), x))
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*results)


def test_the_gram_matrix_of_shared_unused_and_long_weights():
    generator = seeded(0)
    shared = nn.Parameter(torch.randn(40, 30, generator=generator))
    unused = nn.Parameter(torch.randn(3, generator=generator))
    one = nn.Parameter(torch.randn((), generator=generator))
    leaves = [shared, unused, one]
    x = torch.randn(8, 40, generator=generator)
    hidden = torch.tanh(x @ shared) @ shared.T * one
    losses = torch.stack([hidden[:, k].square().mean() for k in range(5)] + [one * 3])
    found = streamed_gram(losses, leaves)
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)
        ]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    expected = torch.stack(rows).double()
    assert relative_error(found, expected @ expected.T) < 1e-6
    assert not any(leaf._backward_hooks for leaf in leaves)


def test_an_operation_that_cannot_be_batched_says_what_to_do():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float(gradient.sum())  # looks at a number

    weight = nn.Parameter(torch.ones(2))
    losses = torch.stack([Opaque.apply(weight).sum(), Opaque.apply(weight).prod()])
    with pytest.raises(RuntimeError, match="pass rows='keep'"):
        streamed_gram(losses, [weight])
    assert not weight._backward_hooks
