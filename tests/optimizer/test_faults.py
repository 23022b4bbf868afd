"""What must not go wrong silently: models, states and interrupts that are out of the ordinary."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys

import pytest
import torch
from helpers import as_users_run_it
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from gradkit.testing import bits as plain

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)
PACKAGE = os.path.join(os.path.dirname(gk.__file__), "")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class Aliased(nn.Module):
    """Registers one module under two names and ties two others' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.norm = self.body[1]
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)
        self.right.weight = self.left.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.right(self.left(self.body(x)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_registered_twice_keeps_its_parameters(engine: str) -> None:
    model = Aliased()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    optimizer = gk.wrap(sgd(model), gk.SAM(rho=1.0), model=model, engine=engine)
    for _ in range(2):
        optimizer.step(lambda: model(INPUT).square().mean())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.norm.num_batches_tracked == 2
    assert model.left.weight is model.right.weight


def test_both_engines_train_tied_weights_alike() -> None:
    models = {engine: Aliased() for engine in ENGINES}
    for engine, model in models.items():
        torch.manual_seed(1)
        for parameter in (model.left.weight, model.left.bias, model.right.bias):
            nn.init.normal_(parameter)
        optimizer = gk.wrap(sgd(model), gk.SAM(rho=1.0), model=model, engine=engine)
        for _ in range(3):
            optimizer.step(lambda model=model: model(INPUT).square().mean())
    assert plain(models["functional"].state_dict()) == plain(models["inplace"].state_dict())


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(engine: str) -> None:
    objectives_of = lambda model: {  # noqa: E731 # short and used twice
        "a": lambda: model(INPUT).square().mean(),
        "b": lambda: -model(INPUT).mean(),
    }

    def make() -> tuple[nn.Module, gk.GradientOptimizer]:
        model = network()
        chain = (gk.PCGrad(), gk.SAM(), gk.GatedEMA(model, between=("a", "b")))
        return model, gk.wrap(sgd(model), *chain, model=model, engine=engine)

    def snapshot(model: nn.Module, optimizer: gk.GradientOptimizer) -> dict[str, object]:
        return {
            "model": plain(model.state_dict()),
            "kinds": [type(p).__name__ for m in model.modules() for p in m._parameters.values()],
            "grads": [plain(parameter.grad) for parameter in model.parameters()],
            "state": plain(optimizer.state_dict()),
            "teacher": plain(optimizer.transforms[2].teacher.state_dict()),
        }

    model, optimizer = make()
    optimizer.step(objectives_of(model))
    before = snapshot(model, optimizer)
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        # The package's own lines only: other code may hold a lock that an interrupt leaves locked.
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines += event == "line"
        return count

    tracer = sys.gettrace()  # a coverage measurement's, perhaps
    sys.settrace(count)
    optimizer.step(objectives_of(model))
    sys.settrace(tracer)
    after = snapshot(model, optimizer)
    assert before != after

    outcomes = set()
    for target in range(0, lines, max(1, lines // 40)):
        model, optimizer = make()
        optimizer.step(objectives_of(model))
        position = 0

        def strike(frame, event, _, target=target):
            nonlocal position
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                position += 1
                if position == target + 1:
                    signal.raise_signal(signal.SIGINT)
            return strike

        try:
            sys.settrace(strike)
            optimizer.step(objectives_of(model))
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        state = snapshot(model, optimizer)
        assert state in (before, after)
        outcomes.add(state == after)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        optimizer.step(objectives_of(model))  # and it goes on
    assert outcomes == {True, False}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reentrant_checkpoint_is_refused(engine: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = gk.wrap(sgd(model), model=model, engine=engine)
    x = INPUT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(lambda: model[1](checkpoint(model[0], x, use_reentrant=True)).sum())
    optimizer.step(lambda: model[1](checkpoint(model[0], x, use_reentrant=False)).sum())
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_without_gradient_does_not_repeat_the_last_step(engine: str) -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model, engine=engine)
    optimizer.step(lambda: model(INPUT).sum())
    weights = plain(model.state_dict())
    with pytest.warns(UserWarning, match="produced no gradient"):
        optimizer.step(lambda: torch.zeros(()))
    assert not optimizer.last_step.applied
    assert plain(model.state_dict()) == weights
    # What the user adds to those gradients is the user's again.
    model(INPUT).sum().backward()
    assert optimizer.step(lambda: torch.zeros(())) == 0
    assert plain(model.state_dict()) != weights


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_frozen_between_steps_stays(engine: str) -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model, engine=engine)
    closure = lambda: model(INPUT).square().mean()  # noqa: E731 # used twice
    optimizer.step(closure)
    model[0].requires_grad_(False)
    frozen, other = model[0].weight.clone(), model[3].weight.clone()
    optimizer.step(closure)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[3].weight, other)
    model[0].requires_grad_(True)
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, frozen)
    # Without a closure, and with nothing to step on but what the step before left.
    frozen = model[0].weight.clone()
    model[0].requires_grad_(False)
    for layer in (model[1], model[3]):
        layer.zero_grad()
    with pytest.warns(UserWarning, match="nothing to step on"):
        optimizer.step()
    assert torch.equal(model[0].weight, frozen)


def test_a_step_at_learning_rate_zero_is_a_step() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.0, momentum=0.9), max_norm=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert torch.allclose(momentum, torch.tensor([0.6, 0.8]), atol=1e-5)
    weight.grad = torch.tensor([torch.nan, 0.0])
    with pytest.raises(gk.NonFiniteError):
        optimizer.step()


class Mean(gk.Transform):
    """Keeps a running mean of the gradients, from a start that is not zero."""

    def initial_vectors(self, layout):
        return {"mean": torch.full((layout.numel,), 10.0)}

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            context.propose(self, mean=self.vectors["mean"] / 2 + gradients.direction() / 2)
            return gradients

        return oracle


@pytest.mark.parametrize("make_base", [torch.optim.SGD, torch.optim.Adam])
def test_vectors_are_saved_for_parameters_of_every_kind(make_base) -> None:
    """Stepped ones, ones without gradient so far, frozen ones; saved again right after loading."""
    stepped, waiting, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = gk.wrap(make_base([stepped, waiting, frozen], lr=0.1), Mean())
    optimizer.step(lambda: (stepped + frozen).sum())
    frozen.requires_grad_(False)
    optimizer.step(lambda: stepped.sum())
    state = optimizer.state_dict()
    fresh = gk.wrap(make_base([stepped, waiting, frozen], lr=0.1), Mean())
    fresh.load_state_dict(copy.deepcopy(state))
    assert plain(fresh.state_dict()) == plain(state)
    frozen.requires_grad_(True)
    for each in (optimizer, fresh):
        loss = (stepped + waiting + frozen).sum
        each.zero_grad()
        each.step(lambda loss=loss: (stepped + waiting + frozen).sum())
    values = fresh.transforms[0].vectors["mean"]
    assert torch.equal(values, optimizer.transforms[0].vectors["mean"])
    #  stepped: 10 → 5.5 → 3.25 → 2.125; waiting: 10 → 5 → 2.5 → 1.75; frozen: 10 → 5.5 → 3.25
    assert values.tolist() == [2.125, 2.125, 1.75, 1.75, 3.25, 3.25]


def test_a_new_group_starts_with_the_initial_vectors() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = gk.wrap(torch.optim.SGD([first], lr=0.1), Mean())
    optimizer.step(lambda: first.sum())
    optimizer.add_param_group({"params": [second]})
    optimizer.step(lambda: (first + second).sum())
    assert optimizer.transforms[0].vectors["mean"].tolist() == [3.25, 5.5]


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("later", None)

    def forward(self) -> torch.Tensor:
        self.seen = torch.cat([self.seen, torch.ones(1)])
        self.later = torch.ones(2) if self.later is None else self.later + 1
        return (self.weight * self.expanded).sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_that_are_replaced(engine: str) -> None:
    model = Growing()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)

    def fails():
        model()
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert model.later is None
    assert len(model.seen) == 0
    for _ in range(2):
        optimizer.step(lambda: model())
    assert len(model.seen) == 2  # one for each step, none for SAM's second evaluation
    assert model.later.tolist() == [2.0, 2.0]
    assert model.expanded.tolist() == [1.0, 1.0, 1.0]


def test_an_embedding_that_writes_its_weight() -> None:
    model = nn.Embedding(4, 2, max_norm=0.5)
    with pytest.raises(ValueError, match="max_norm"):
        gk.wrap(sgd(model), model=model, engine="functional").step(lambda: model.weight.sum())
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    before = plain(model.state_dict())

    def fails():
        model(torch.arange(4))
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert plain(model.state_dict()) == before
    optimizer.step(lambda: model(torch.arange(4)).sum())
    assert plain(model.state_dict()) != before


class ToNaN(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(weights=gradients.weights * torch.nan)

        return oracle


class UpdateToNaN(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(update=gradients.direction() / 0 * 0)

        return oracle


@pytest.mark.parametrize("transform", [ToNaN, UpdateToNaN])
def test_a_transform_that_returns_nan(transform) -> None:
    model = network()
    before = plain(model.state_dict())
    optimizer = gk.wrap(sgd(model), transform(), model=model)
    with pytest.raises(gk.NonFiniteError, match="transforms' result is not finite"):
        optimizer.step(lambda: model(INPUT).sum())
    optimizer.options.nonfinite = "skip"
    optimizer.step(lambda: model(INPUT).sum())
    assert plain(model.state_dict()) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_code_that_fails_on_weights_displaced_by_nan(engine: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)

    def closure():
        if torch.isnan(model.weight).any():
            raise ValueError("I will have no NaN")
        return model.weight.sum() * torch.nan

    with pytest.raises(gk.NonFiniteError, match="loss of objective 'loss' is nan") as caught:
        optimizer.step(closure)
    assert isinstance(caught.value.__cause__, ValueError)
    optimizer.options.nonfinite = "skip"
    optimizer.step(closure)
    assert not optimizer.last_step.applied
    with pytest.raises(ValueError, match="Expected parameter"):  # an error of its own is no NaN
        optimizer.step(lambda: torch.distributions.Normal(torch.nan, 1.0, validate_args=True))


def test_an_infinite_gradient_of_a_finite_loss_is_found() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(gk.NonFiniteError, match="gradient of objective 'root' is not finite"):
        optimizer.step({"fine": lambda: weight.sum(), "root": lambda: weight.sqrt().sum()})
    optimizer.options.nonfinite = "ignore"
    optimizer.step({"root": lambda: weight.sqrt().sum()})
    assert not weight.isfinite().item()


def test_parameters_without_a_gradient_do_not_count_in_a_step_without_closure() -> None:
    """Also where gradients that somebody else holds are copied to memory that was used before."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    optimizer = gk.wrap(torch.optim.SGD([first, second], lr=1.0), max_norm=1.0)
    held = torch.tensor([0.6, 0.8]), torch.full((3,), 1e6)
    first.grad, second.grad = held
    optimizer.step()
    before = first.detach().clone()
    first.grad, second.grad = held[0], None
    optimizer.step()
    assert torch.allclose(before - first.detach(), held[0], atol=1e-5)
    assert optimizer.last_step.gram.item() == pytest.approx(1.0)


class _Huge(gk.Transform):
    """Weights that are finite in float64 only, or rows that no evaluation has seen."""

    def __init__(self, what: str) -> None:
        self.what = what

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            if self.what == "weights":
                return gradients.replace(weights=gradients.weights * 1e60)
            return gradients.replace(rows=gradients.rows * torch.inf)

        return oracle


@pytest.mark.parametrize("what", ["weights", "rows"])
def test_a_direction_that_overflows_is_not_applied(what: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), _Huge(what))
    closures = {"a": lambda: weight.sum(), "b": lambda: weight.square().sum()}
    with pytest.raises(gk.NonFiniteError, match="the transforms' result is not finite"):
        optimizer.step(closures)
    assert weight.tolist() == [1.0, 1.0]
    optimizer.options.nonfinite = "skip"
    optimizer.step(closures)
    assert weight.tolist() == [1.0, 1.0]
    assert not optimizer.last_step.applied


def test_a_float16_direction_longer_than_the_largest_number_is_applied() -> None:
    weight = nn.Parameter(torch.ones(10_000, dtype=torch.float16))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1e-3))
    optimizer.step(lambda: (weight * 1000).float().sum())
    assert optimizer.last_step.applied
    assert weight.isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copied_optimizer_keeps_its_transforms(copied) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), gk.PCGrad())
    twin = copied(optimizer)
    rule = twin.transforms[0]
    before = rule.generator.get_state()
    rule.weights(torch.eye(3))
    assert torch.equal(rule.generator.get_state(), before)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        gk.wrap(torch.optim.SGD([weight], lr=1.0), rule)


def test_gradients_of_any_finite_size_are_finite() -> None:
    for scale in (1e-25, 1e20):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), max_norm=1.0)
        optimizer.step(
            {
                "a": lambda w=weight, s=scale: w[0] * s,
                "b": lambda w=weight, s=scale: (w[0] + w[1]) * s,
            }
        )
        assert torch.allclose(optimizer.last_step.cosine("a", "b"), torch.tensor(0.5**0.5))


class SetsUpdate(gk.Transform):
    sets_update = True

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(update=gradients.direction().sign())

        return oracle


class HidesIt(SetsUpdate):
    sets_update = False


def test_a_rule_after_an_elementwise_one() -> None:
    weight = nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([weight], lr=0.1)
    for first in (SetsUpdate(), gk.PCGrad(scope="tensor")):
        with pytest.raises(ValueError, match="cannot follow"):
            gk.wrap(base, first, gk.Mean())
    with pytest.raises(ValueError, match="cannot follow"):
        gk.wrap(base, HidesIt(), gk.Mean()).step(lambda: weight.sum())
    with pytest.raises(ValueError, match="cannot be joined"):
        gk.wrap(base, SetsUpdate(), gk.LookAhead()).step(
            {"pseudo": lambda: weight.sum(), "auxiliary": lambda: weight.sum()}
        )


@pytest.mark.parametrize("make", [lambda m: gk.PCGrad(), lambda m: gk.EMA(m, decay=0.9)])
def test_one_transform_in_two_optimizers(make) -> None:
    model = network()
    transform = make(model)
    first = gk.wrap(sgd(model), transform, model=model)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        gk.wrap(sgd(model), transform, model=model)
    del first
    gk.wrap(sgd(model), transform, model=model)


def test_half_precision_sam() -> None:
    weight = nn.Parameter(torch.full((4,), 1.0, dtype=torch.float16))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.5), gk.SAM(rho=0.05))
    optimizer.step(lambda: (weight * 1e-6).sum())  # ρ/‖g‖ is beyond float16
    assert weight.isfinite().all()


def test_another_default_device() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), gk.PCGrad(), gk.SAM())
    objectives = {str(k): lambda k=k: weight[k] - weight.sum() for k in range(3)}
    with torch.device("meta"):
        optimizer.step(objectives)
    assert weight.isfinite().all()


def test_outer_autocast_sees_displaced_weights() -> None:
    for engine in ENGINES:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gk.SAM(rho=1.0),
                            model=model, engine=engine)  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step(lambda model=model: model(torch.ones(1, 1)).float().square().sum() / 2)
        assert model.weight.item() == -1.0  # 1 − (1 + ρ)


def test_step_hooks_are_called_as_torch_calls_them() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0))
    seen = []

    def rewrite(self, args, kwargs):
        assert args[0] is self
        return (self, lambda: 3 * weight.sum()), kwargs

    optimizer.register_step_pre_hook(rewrite)
    optimizer.register_step_post_hook(lambda self, args, kwargs: seen.append(args[0] is self))
    optimizer.step(lambda: weight.sum())
    assert weight.item() == -2.0
    assert seen == [True]


def test_a_parameter_replaced_in_the_model() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model)
    model[3].weight = nn.Parameter(torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match=r"'3.weight' is no longer the one"):
        optimizer.step(lambda: model(INPUT).sum())


ARGUMENTS = {
    "base": (lambda m: gk.wrap(m.parameters()), TypeError, "pass a torch.optim.Optimizer"),
    "wrapped": (lambda m: gk.wrap(gk.wrap(sgd(m))), ValueError, "one wrap"),
    "lbfgs": (lambda m: gk.wrap(torch.optim.LBFGS(m.parameters())), ValueError, "LBFGS"),
    "sparse": (lambda m: gk.wrap(torch.optim.SparseAdam(list(m.parameters()))), ValueError, "Spar"),
    "class": (lambda m: gk.wrap(sgd(m), gk.PCGrad), TypeError, r"write PCGrad\(\)"),
    "module": (lambda m: gk.wrap(sgd(m), m), TypeError, "model as model="),
    "model": (lambda m: gk.wrap(sgd(m), model=3), TypeError, "torch.nn.Module"),
    "engine": (lambda m: gk.wrap(sgd(m), engine="fast"), ValueError, "'fast'"),
    "nonfinite": (lambda m: gk.wrap(sgd(m), nonfinite="stop"), ValueError, "'stop'"),
    "max_norm": (lambda m: gk.wrap(sgd(m), max_norm=-1.0), ValueError, "-1.0"),
    "no model": (lambda m: gk.wrap(sgd(m), engine="functional"), ValueError, "pass model="),
    "other model": (
        lambda m: gk.wrap(sgd(m), engine="functional", model=nn.Linear(1, 1)),
        ValueError,
        r"parameter 0 of the optimizer \(group 0, shape \(4, 3\)\)",
    ),
    "compiled": (
        lambda m: gk.wrap(sgd(m), engine="functional", model=torch.compile(m, backend="eager")),
        ValueError,
        "compiled",
    ),
    "rho": (lambda m: gk.SAM(rho=-0.1), ValueError, "-0.1"),
    "activation": (lambda m: gk.CosineLR(activation="cubic"), ValueError, "'cubic'"),
    "look ahead": (lambda m: gk.LookAhead("a", "a"), ValueError, "both 'a'"),
    "decay": (lambda m: gk.EMA(m, decay=1.5), ValueError, "decay is 1.5"),
    "gate decay": (lambda m: gk.GatedEMA(m, decay_conflict=2.0), ValueError, "decay_conflict"),
    "measure": (lambda m: gk.GatedEMA(m, measure="angle"), ValueError, "'angle'"),
    "between": (lambda m: gk.GatedEMA(m, between=("a", "a")), ValueError, "two different"),
    "same teacher": (lambda m: gk.EMA(m, m, decay=0.9), ValueError, "same module"),
    "other teacher": (
        lambda m: gk.EMA(m, nn.Linear(3, 4), decay=0.9), ValueError, r"'0.bias'.*\(absent\)"
    ),
    "scope": (lambda m: gk.PCGrad(scope="layer"), ValueError, "'layer'"),
    "reduction": (lambda m: gk.PCGrad(reduction="max"), ValueError, "'max'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    call, error, message = ARGUMENTS[case]
    with as_users_run_it(), pytest.raises(error, match=message):
        call(network())


OBJECTIVES = {
    "empty": ({}, ValueError, "mapping of objectives is empty"),
    "not a closure": (3, TypeError, "closure"),
    "loss, not closure": ({"a": torch.ones(())}, TypeError, "not a closure"),
    "name": ({1: lambda: torch.ones(())}, TypeError, "names are strings"),
    "vector": (lambda: torch.ones(3, requires_grad=True), ValueError, r"shape \(3,\)"),
    "number": (lambda: 3.0, TypeError, "returned a float"),
    "integer": (lambda: torch.ones((), dtype=torch.long), ValueError, "torch.int64"),
    "complex": (lambda: torch.ones((), dtype=torch.cfloat), ValueError, "torch.complex64"),
    "nested": ({"a": lambda: {"b": torch.ones(())}}, ValueError, "returned a mapping"),
    "empty mapping": (dict, ValueError, "empty mapping"),
    "empty generator": (
        {"a": lambda: (x for x in ()), "b": lambda: torch.ones(())},
        RuntimeError,
        "yielded nothing",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", OBJECTIVES)
def test_bad_objectives_change_nothing(case: str, engine: str) -> None:
    objectives, error, message = OBJECTIVES[case]
    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)
    before = plain([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    with as_users_run_it(), pytest.raises(error, match=message):
        optimizer.step(objectives)
    assert before == plain([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])


def test_names_that_change_within_a_step() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    names = iter(["a", "b"])
    with pytest.raises(ValueError, match="after 'a' in the same step"):
        optimizer.step(lambda: {next(names): model(INPUT).sum()})


def test_backward_with_several_losses() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model)

    def closure():
        a, b = model(INPUT).sum(), model(INPUT).mean()
        (a + b).backward()
        return {"a": a, "b": b}

    with pytest.raises(RuntimeError, match="no longer be told apart"):
        optimizer.step(closure)


def test_sparse_gradients() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step(lambda: model(torch.tensor([1])).sum())


def test_unknown_names() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), gk.CosineLR("a", "c"), model=model)
    closures = {"a": lambda: model(INPUT).sum(), "b": lambda: model(INPUT).mean()}
    with pytest.raises(ValueError, match="CosineLR needs the objective 'c'"):
        optimizer.step(closures)
    with pytest.raises(ValueError, match="no objective 'z'"):
        optimizer.gradients(closures, only=["z"])
    gk.wrap(sgd(model), model=model).step(closures)
    optimizer = gk.wrap(sgd(model), model=model)
    optimizer.step(closures)
    with pytest.raises(ValueError, match="no objective 'c'"):
        optimizer.last_step.cosine("a", "c")


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    before = plain(model.state_dict())
    with pytest.raises(RuntimeError, match="2 ranks"):
        optimizer.step(lambda: model(INPUT).sum())
    assert plain(model.state_dict()) == before


def test_state_of_another_format_or_shape_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), Mean())
    optimizer.step(lambda: weight.sum())
    state = optimizer.state_dict()
    newer = copy.deepcopy(state)
    newer["param_groups"][0]["gradkit"] = '{"version": 99, "transforms": []}'
    with pytest.raises(ValueError, match="format 99"):
        optimizer.load_state_dict(newer)
    other = gk.wrap(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), Mean())
    with pytest.raises(ValueError, match=r"shape \(2,\) where the parameter has \(3,\)"):
        other.load_state_dict(state)
    assert plain(optimizer.state_dict()) == plain(state)


def test_state_keeps_every_bit() -> None:
    weight = nn.Parameter(torch.ones(1))
    transform = gk.Transform()
    kept = {
        "float": 0.1 + 0.2,
        "nan": float("nan"),
        "int": 3,
        "text": "ä",
        "none": None,
        "list": [1, 2.5, [True]],
        "matrix": torch.tensor([[1.0, torch.inf], [-0.0, 1e-45]]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "number": torch.tensor(7),
    }
    transform.state.update(kept)
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), transform)
    state = optimizer.state_dict()
    transform.state.clear()
    optimizer.load_state_dict(state)
    assert str(transform.state.pop("nan")) == str(kept.pop("nan"))
    assert plain(transform.state) == plain(kept)
    transform.state["bad"] = object()
    with pytest.raises(TypeError, match="may hold numbers"):
        optimizer.state_dict()


def test_layouts_that_cannot_be() -> None:
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing to step on"):
        assert gk.wrap(sgd(frozen), model=frozen).step(lambda: torch.ones(())) == 1
    optimizer = gk.wrap(sgd(frozen), gk.PCGrad(), model=frozen)
    optimizer.load_state_dict(optimizer.state_dict())  # nothing to lay out, nothing to complain of


def test_signals_outside_the_main_thread() -> None:
    import threading

    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    thread = threading.Thread(target=lambda: optimizer.step(lambda: model(INPUT).sum()))
    thread.start()
    thread.join()
    assert optimizer.last_step.applied


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 1, 2)])
@pytest.mark.parametrize("objectives", [1, 2])
def test_fused_optimizers_find_gradients_laid_out_as_permuted_weights(
    base: type[torch.optim.Optimizer], order: tuple[int, ...], objectives: int
) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4, 5).permute(*order)
    factors = torch.randn(start.shape)
    results = []
    for wrapped in (True, False):
        weight = nn.Parameter(start.clone(memory_format=torch.preserve_format))
        optimizer = base([weight], lr=0.1, fused=True)

        def loss(k: int, weight: torch.Tensor = weight) -> torch.Tensor:
            return (weight * factors + k).square().sum() / 100

        if wrapped:
            outer = gk.wrap(optimizer)
            for _ in range(3):
                outer.step({str(k): lambda k=k: loss(k) for k in range(objectives)})
        else:
            for _ in range(3):
                optimizer.zero_grad()
                sum(loss(k) for k in range(objectives)).backward()
                optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def test_a_base_that_writes_into_gradients_leaves_them_recognisable() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    optimizer = gk.wrap(base, model=model)

    def closure() -> torch.Tensor:
        return model(INPUT).square().mean()

    optimizer.step(closure)
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer.step(closure)
    assert torch.equal(model[0].weight, frozen)
    frozen = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="produced no gradient"):
        optimizer.step(lambda: closure().detach())
    assert all(map(torch.equal, frozen, model.parameters()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_from_before_that_a_closure_clears_do_not_count(
    engine: str, to_none: bool
) -> None:
    results = []
    for before in (True, False):
        model = network()
        optimizer = gk.wrap(sgd(model), model=model, engine=engine)
        if before:
            model(INPUT).sum().backward()

        def closure() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=to_none)
            return model(INPUT).square().mean()

        buffers = [buffer.clone() for buffer in network().buffers()]
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        optimizer.step(closure)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_finds_the_bases_state_and_adds_nothing_to_it(engine: str) -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)
    found = []

    def closure() -> torch.Tensor:
        for group in optimizer.param_groups:
            found.extend("momentum_buffer" in optimizer.state[p] for p in group["params"])
        return model(INPUT).square().mean()

    optimizer.step(lambda: model(INPUT).square().mean())
    optimizer.step(closure)
    assert all(found)
    assert len(found) == 12
    assert set(optimizer.state) == set(model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
