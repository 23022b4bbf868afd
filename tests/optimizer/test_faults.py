"""What must not go wrong silently: models, layers and bases that are out of the ordinary."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)


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


def test_half_precision_sam() -> None:
    weight = nn.Parameter(torch.full((4,), 1.0, dtype=torch.float16))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.5), gk.SAM(rho=0.05))
    optimizer.step(lambda: (weight * 1e-6).sum())  # ρ/‖g‖ is beyond float16
    assert weight.isfinite().all()


CHAINS = {
    "PCGrad and SAM": lambda model: (gk.PCGrad(), gk.SAM()),
    "ASAM": lambda model: (gk.ASAM(),),
    "BSAM": lambda model: (gk.BSAM(num_data=10),),
    "ESAM": lambda model: (gk.ESAM(),),
    "gate by two signs": lambda model: (gk.GatedEMA(model, between=("0", "1")),),
    "gate by signs": lambda model: (gk.SANDMask(), gk.GatedEMA(model, between=("0", "2"))),
}


@pytest.mark.parametrize("name", CHAINS)
def test_another_default_device_and_dtype(name: str) -> None:
    results = []
    for default in (contextlib.nullcontext, lambda: torch.device("meta"), default_float64):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        x = torch.randn(4, 3)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = gk.wrap(base, *CHAINS[name](model), model=model)

        def loss(k: int, model: nn.Module = model, x: torch.Tensor = x, samples=None):
            each = (model(x)[:, k] - k).square()
            return each if samples is None else each[samples]

        objectives = {str(k): lambda samples=None, k=k: loss(k, samples=samples) for k in range(3)}
        if name != "ESAM":
            objectives = {key: lambda each=each: each().mean() for key, each in objectives.items()}
        with default():
            for _ in range(2):
                optimizer.step(objectives)
        gate = optimizer.last_step.gate
        assert gate is None or gate.device.type == "cpu"
        results.append((*plain([*model.parameters()]), None if gate is None else float(gate)))
    assert results[0] == results[1] == results[2]


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_sharpness_is_measured_under_another_default_device() -> None:
    model = nn.Linear(3, 2)
    x = torch.ones(4, 3)
    arguments = {"eigenvalues": 2, "trace_samples": 3}
    reports = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            reports.append(gk.sharpness.report(lambda: model(x).square().sum(), model, **arguments))
    assert reports[0] == reports[1]


def test_outer_autocast_sees_displaced_weights() -> None:
    for engine in ENGINES:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gk.SAM(rho=1.0),
                            model=model, engine=engine)  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step(lambda model=model: model(torch.ones(1, 1)).float().square().sum() / 2)
        assert model.weight.item() == -1.0  # 1 − (1 + ρ)


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
