"""What a newcomer does at first, and what the error says to do instead."""

import pytest
import torch
from helpers import as_users_run_it
from torch import nn
from torchjd.aggregation import UPGrad as TorchjdUPGrad

import gradkit as gk


def problem(*transforms, **options):
    model = nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, gk.wrap(base, *transforms, model=model, **options), torch.ones(4, 3)


def test_losses_need_names():
    model, optimizer, x = problem(gk.PCGrad())
    first, second = (lambda k=k: model(x)[:, k].mean() for k in range(2))
    with as_users_run_it():
        with pytest.raises(TypeError, match=r'not a list; give each .*step\(\{"a": first'):
            optimizer.step([first, second])
        with pytest.raises(TypeError, match="returned a list; return one loss as a tensor, or sev"):
            optimizer.step(lambda: [first(), second()])
        with pytest.raises(TypeError, match=r"objective 'a' is a Tensor.*runs the model"):
            optimizer.step({"a": first(), "b": second()})


def test_no_loss():
    model, optimizer, x = problem(gk.PCGrad())

    def forgets_to_return():
        model(x).mean()

    with pytest.warns(UserWarning, match=r"the loss is None.*is there a return\?\)"):
        optimizer.step(forgets_to_return)
    for nothing, why in ((None, "the loss is None"), (torch.tensor(0.0), "does not depend on any")):
        with pytest.raises(gk.NoGradientError, match=f"{why}.*leave out an objective that has no"):
            optimizer.step(lambda nothing=nothing: {"a": model(x).mean(), "b": nothing})


def test_transforms_of_other_kinds():
    with as_users_run_it():
        with pytest.raises(TypeError, match=r"UPGrad; pass gradkit .*as gk.Aggregate\(\.\.\.\)"):
            problem(TorchjdUPGrad())
        with pytest.raises(TypeError, match=r"gk.wrap\(base, \*transforms\)"):
            problem([gk.PCGrad(), gk.SAM()])


def test_a_main_objective_that_is_absent():
    model, optimizer, x = problem(gk.CosineGate(main="seg"))

    def closures(*names):
        return {name: (lambda k=k: model(x)[:, k].mean()) for k, name in enumerate(names)}

    with pytest.raises(ValueError, match=r"no objective 'seg'; there are 'a', 'b'.*main objective"):
        optimizer.step(closures("a", "b"))


def test_numbers_for_objectives_that_may_be_absent():
    model, optimizer, x = problem(gk.UPGrad(preference=[1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="or a mapping from names where some may be absent"):
        optimizer.step({"a": lambda: model(x)[:, 0].mean(), "b": lambda: model(x)[:, 1].mean()})


def test_losses_that_a_method_cannot_work_with_are_named():
    model, optimizer, x = problem(gk.DBMTL())

    def closure():
        a, b = model(x).mean(0)
        return {"fine": a - a.detach() + 1, "bad": b - b.detach() - 1}

    with pytest.raises(gk.NonFiniteError, match="and that of objective 'bad' is"):
        optimizer.step(closure)


class OnlyOneByOne(torch.autograd.Function):
    """Its backward looks at numbers."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy() * 2)


def test_what_cannot_be_batched_says_what_to_do():
    model, optimizer, x = problem(gk.PCGrad(), rows="stream")

    def closure():
        a, b = OnlyOneByOne.apply(model(x)).mean(0)
        return {"a": a, "b": b}

    with pytest.raises(RuntimeError, match="pass rows='keep'"):
        optimizer.step(closure)


class Returns(gk.Transform):
    """Makes something of the gradients, as a user's transform does."""

    sets_update = True

    def __init__(self, make):
        self.make = make

    def around(self, inner, context):
        return lambda at=None, only=None: self.make(inner(at, only), context)


def parts(gradients, context):
    return context.layout.views(gradients.direction())


MISFITS = {
    "an update that is too long": (
        lambda g, c: g.with_update(torch.ones(9)),
        r"Returns returned an update of shape \(9,\).* weights, of shape \(8,\)",
    ),
    "a complex update": (
        lambda g, c: g.with_update(g.direction() * 1j),
        r"Returns returned an update of dtype torch\.complex64; .* a real vector",
    ),
    "an update in parts": (
        lambda g, c: g.with_update(parts(g, c)),
        r"Returns returned a list as its update.*context\.layout\.flatten\(\)",
    ),
    "a single row": (
        lambda g, c: g.replace(rows=torch.ones(1, 8)),
        r"Returns returned rows of shape \(1, 8\).* matrix of shape \(2, 8\)",
    ),
    "rows in a list": (
        lambda g, c: g.replace(rows=[*g.rows]),
        r"Returns returned a list as its rows.* matrix of shape \(2, 8\)",
    ),
    "one weight for all": (
        lambda g, c: g.replace(weights=torch.ones(1)),
        r"Returns returned weights of shape \(1,\).*its 2 objectives \('a', 'b'\)",
    ),
    "no gradients": (
        lambda g, c: g.weights / 2,
        r"Returns returned a Tensor in place of gradients.*reweighted\(factors\)",
    ),
}


def two(model, x):
    return {name: (lambda k=k: model(x)[:, k].square().mean()) for k, name in enumerate("ab")}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("around", [(), (gk.SAM(),)], ids=["last", "inside SAM"])
def test_gradients_that_do_not_fit(kind, around):
    make, message = MISFITS[kind]
    model, optimizer, x = problem(Returns(make), *around)
    before = model.weight.clone()
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        optimizer.step(two(model, x))
    assert torch.equal(model.weight, before)


class Factors(gk.Reweighing):
    def weigher(self, context):
        return lambda gradients: gradients.weights / 2


@pytest.mark.parametrize("inside", [(), (gk.SAM(),)], ids=["first", "around SAM"])
def test_a_weigher_that_returns_factors(inside):
    model, optimizer, x = problem(*inside, Factors())
    with (
        as_users_run_it(),
        pytest.raises(TypeError, match=r"Factors returned a Tensor.*reweighted"),
    ):
        optimizer.step(two(model, x))


def test_new_rows_where_they_would_not_count():
    model, optimizer, x = problem(
        gk.TrimmedMean(),
        Returns(lambda g, c: g.replace(rows=g.rows - g.rows.mean(1, keepdim=True))),
    )
    with pytest.raises(ValueError, match=r"rows=\) would change nothing.*before.*with_update"):
        optimizer.step(two(model, x))
    both = Returns(lambda g, c: g.replace(rows=g.rows / 2, update=g.rows[0] / 2))
    model, optimizer, x = problem(gk.TrimmedMean(), both)
    optimizer.step(two(model, x))
    assert optimizer.last_step.applied


def test_a_rule_cannot_follow_an_update():
    with pytest.raises(ValueError, match=r"cannot follow Returns, .*gradients\.replace\(rows=\)"):
        problem(Returns(lambda g, c: g), gk.PCGrad())


class Keeps(gk.Transform):
    """Proposes a value under the name "kept"."""

    def __init__(self, value, **state):
        self.value = value
        self.state.update(state)

    def around(self, inner, context):
        context.propose(self, kept=self.value)
        return inner


def test_state_that_cannot_be_kept():
    lost = r"state 'kept' of Keeps holds a dict.*two lists"
    with pytest.raises(TypeError, match=lost):
        problem(Keeps(0, kept={"a": 1.0}))
    model, optimizer, x = problem(Keeps([{"a": 1.0}]))
    with pytest.raises(TypeError, match=lost):
        optimizer.step(two(model, x))
    model, optimizer, x = problem(Keeps({1, 2}))
    with pytest.raises(
        TypeError, match=r"holds a set.*numbers, strings, tensors and lists of them$"
    ):
        optimizer.step(two(model, x))


def test_a_flat_vector_is_no_small_state():
    model, optimizer, x = problem(Keeps(torch.zeros(8)))
    with pytest.raises(ValueError, match=r"Keeps proposed a tensor 'kept' of shape \(8,\)"):
        optimizer.step(two(model, x))
    model, optimizer, x = problem(Keeps(torch.zeros(8), kept=None))  # eight numbers, it says
    optimizer.step(two(model, x))
    assert torch.equal(optimizer.transforms[0].state["kept"], torch.zeros(8))


def test_state_is_assigned_by_name():
    with pytest.raises(AttributeError, match=r"state of Transform.*self\.state\[name\] = value"):
        gk.Transform().state = {"steps": 0}
    with pytest.raises(AttributeError, match=r"vectors of Transform.*initial_vectors"):
        gk.Transform().vectors = {}


def test_the_context_is_told_who_asks():
    class Requires(gk.Transform):
        def around(self, inner, context):
            context.require("c")
            return inner

    model, optimizer, x = problem(Requires())
    with as_users_run_it(), pytest.raises(TypeError, match=r"write context.require\(self, 'c'\)"):
        optimizer.step(two(model, x))


def test_a_transform_is_shown_by_its_name():
    assert repr(Returns(None)) == "Returns"
    assert repr(gk.SAM(rho=0.1)) == "SAM(rho=0.1)"
