"""Which optimizers can be wrapped, and what those keep that are shaped unlike torch's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
from accelerate import Accelerator
from helpers import flat
from integrations.references import data, error, network
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.optim import SGD, Adam, Optimizer

import gradkit as gk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own module uses what torch deprecates
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

ENGINES = ["functional", "inplace"]
BATCHES = data(5)


# Shapes of optimizers that others have written, each as short as it can be.


class Properties(Optimizer):
    """Shows the groups and state of the one inside, and gives neither away."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.defaults = inner.defaults

    @property
    def state(self):
        return self.inner.state

    @property
    def param_groups(self):
        return self.inner.param_groups

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self, closure=None):
        return self.inner.step()


class Aliases(Properties):
    """Takes the groups over as its own, where loading leaves it with the old ones."""

    state: Any = None
    param_groups: Any = None

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state


class SlowWeights(Properties):
    """Keeps a state beside the inner one, and saves it in a form of its own."""

    state: Any = None

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self.state = defaultdict(dict)
        self.count = 0

    def __getstate__(self):
        return {"count": self.count}

    def every(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.count += 1
        for p in self.every():
            slow = self.state[p].setdefault("slow", p.clone())
            if self.count % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        slow = {index: dict(self.state[p]) for index, p in enumerate(self.every())}
        return {"slow": slow, "inner": self.inner.state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict["inner"])
        self.count = state_dict["count"]
        for index, p in enumerate(self.every()):
            self.state[p] = {key: t.clone() for key, t in state_dict["slow"][index].items()}


class Global(SGD):
    """Keeps a number for all parameters in `state`, and another beside it in the state dict."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.state["k"] = 0
        self.total = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.state["k"] += 1
        self.total += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / (self.state["k"] + self.total))

    def state_dict(self):
        return {**super().state_dict(), "total": self.total}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.total = state_dict["total"]


class Several(Optimizer):
    """Steps two optimizers, and joins what they show."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self):
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self):
        return {key: held for each in self.optimizers for key, held in each.state.items()}

    def zero_grad(self, set_to_none=True):
        for each in self.optimizers:
            each.zero_grad(set_to_none)

    def step(self, closure=None):
        for each in self.optimizers:
            each.step()

    def state_dict(self):
        return {str(number): each.state_dict() for number, each in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict):
        for number, each in enumerate(self.optimizers):
            each.load_state_dict(state_dict[str(number)])


class ScheduleFree(SGD):
    """Trains at weights that are not those to evaluate, and switches between them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.param_groups[0]["train_mode"] = False

    def train(self):
        self._switch(True, -1.0)

    def eval(self):
        self._switch(False, 1.0)

    @torch.no_grad()
    def _switch(self, mode: bool, shift: float) -> None:
        if self.param_groups[0]["train_mode"] != mode:
            for p in self.param_groups[0]["params"]:
                p.add_(shift)
        self.param_groups[0]["train_mode"] = mode

    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("call train() first")
        return super().step()


def momentum(net: nn.Module) -> SGD:
    return SGD(net.parameters(), lr=0.1, momentum=0.9)


po: Any = pytorch_optimizer
Make = Callable[[nn.Module], Optimizer]
BASES: dict[str, Make] = {
    "properties": lambda net: Properties(momentum(net)),
    "aliases": lambda net: Aliases(momentum(net)),
    "a form of its own": lambda net: SlowWeights(momentum(net)),
    "properties of a form of its own": lambda net: Properties(SlowWeights(momentum(net))),
    "a number for all": lambda net: Global(net.parameters(), lr=0.1),
    "several": lambda net: Several(
        SGD(net[0].parameters(), lr=0.1, momentum=0.9), Adam(net[3].parameters(), lr=0.1)
    ),
    "OrthoGrad": lambda net: po.OrthoGrad(momentum(net)),
    "TRAC": lambda net: po.TRAC(Adam(net.parameters(), lr=0.01)),
    "Lookahead": lambda net: po.Lookahead(momentum(net), k=2, pullback_momentum="pullback"),
    "ScheduleFreeWrapper": lambda net: po.ScheduleFreeWrapper(SGD(net.parameters(), lr=0.1)),
    "ScheduleFreeAdamW": lambda net: po.ScheduleFreeAdamW(net.parameters(), lr=0.1),
    "StableSPAM": lambda net: po.StableSPAM(net.parameters(), lr=0.01),
    "MADGRAD": lambda net: po.MADGRAD(net.parameters(), lr=0.01),
}
GROUPED: dict[str, Make] = {
    "PostLocalSGD": lambda net: PostLocalSGDOptimizer(
        momentum(net), PeriodicModelAverager(2, warmup_steps=1)
    ),
    "ZeRO": lambda net: ZeroRedundancyOptimizer(net.parameters(), SGD, lr=0.1, momentum=0.9),
}
EVERY = {**BASES, **GROUPED}


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """One process as a group, for those that cannot do without."""
    if not any(name in request.node.name for name in GROUPED):
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(net: nn.Module, batch: tuple) -> dict[str, Tensor]:
    return dict(zip("ab", (net(batch[0]) - batch[1]).square().mean(0), strict=True))


def ready(optimizer: Any) -> Any:
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def wrapped(name: str, engine: str, *transforms: gk.Transform) -> tuple[nn.Module, Any]:
    net = network()
    return net, ready(gk.wrap(EVERY[name](net), *transforms, model=net, engine=engine))


def chain() -> tuple[gk.Transform, ...]:
    """Transforms with small state, with vectors, and with evaluations at other weights."""
    return gk.CRMOGM(), gk.SAM(rho=0.1)


def take(net: nn.Module, optimizer: Any, batches: list) -> Tensor:
    for batch in batches:
        optimizer.step(lambda: losses(net, batch))
    return flat(net.parameters())


def saved(net: nn.Module, optimizer: Any) -> tuple[dict, dict]:
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EVERY)
def test_it_steps_as_the_bare_one(name: str, engine: str) -> None:
    theirs, ours = network(), network()
    bare = ready(EVERY[name](theirs))
    optimizer = ready(gk.wrap(EVERY[name](ours), model=ours, engine=engine))
    for batch in BATCHES[:3]:
        bare.zero_grad()
        error(theirs, batch).backward()
        bare.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in ours.parameters())
        optimizer.step(lambda: error(ours, batch))
    assert torch.equal(flat(ours.parameters()), flat(theirs.parameters()))
    assert not torch.equal(flat(ours.parameters()), flat(network().parameters()))


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "inplace") for name in EVERY),
        ("properties", "functional"),
        ("several", "functional"),
    ],
)
def test_it_resumes_bit_for_bit(name: str, engine: str) -> None:
    net, optimizer = wrapped(name, engine, *chain())
    take(net, optimizer, BATCHES[:3])
    weights, state = saved(net, optimizer)
    expected = take(net, optimizer, BATCHES[3:])
    again, resumed = wrapped(name, engine, *chain())
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert torch.equal(take(again, resumed, BATCHES[3:]), expected)


@pytest.mark.parametrize("name", EVERY)
def test_state_saved_before_the_first_step_is_loaded(name: str) -> None:
    net, optimizer = wrapped(name, "inplace", *chain())
    _, state = saved(net, optimizer)
    expected = take(net, optimizer, BATCHES[:2])
    again, resumed = wrapped(name, "inplace", *chain())
    resumed.load_state_dict(state)
    assert torch.equal(take(again, resumed, BATCHES[:2]), expected)


@pytest.mark.parametrize("name", ["properties", "aliases", "Lookahead", "several", "PostLocalSGD"])
def test_after_loading_learning_rates_still_reach_the_one_inside(name: str) -> None:
    net, optimizer = wrapped(name, "inplace", gk.CosineLR("a", "b", activation=lambda c: 0 * c))
    before = flat(net.parameters())
    optimizer.load_state_dict(saved(net, optimizer)[1])
    assert torch.equal(take(net, optimizer, BATCHES[:1]), before)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    del optimizer
    plain = gk.wrap(EVERY[name](net), model=net)
    plain.load_state_dict(plain.state_dict())
    for group in plain.param_groups:
        group["lr"] = 0.0
    assert torch.equal(take(net, plain, BATCHES[:1]), before)


@pytest.mark.parametrize("how", ["copied", "pickled"])
@pytest.mark.parametrize("name", BASES)
def test_copies_go_on_alike(name: str, how: str) -> None:
    net, optimizer = wrapped(name, "inplace", *chain())
    take(net, optimizer, BATCHES[:3])
    pair = (net, optimizer)
    copied = copy.deepcopy(pair) if how == "copied" else pickle.loads(pickle.dumps(pair))
    assert copied[1].base is not optimizer.base
    expected = take(net, optimizer, BATCHES[3:])
    before = flat(net.parameters())
    assert torch.equal(take(*copied, BATCHES[3:]), expected)
    assert torch.equal(flat(net.parameters()), before)


@pytest.mark.parametrize("name", ["a form of its own", "Lookahead"])
def test_a_form_of_its_own_is_checked_before_anything_is_loaded(name: str) -> None:
    net, optimizer = wrapped(name, "inplace", *chain())
    take(net, optimizer, BATCHES[:2])
    _, state = saved(net, optimizer)
    before = copy.deepcopy(saved(net, optimizer))
    for wrong, message in (
        ({**state, "gradkit": {**state["gradkit"], "vectors": []}}, "of 0 parameters and the opt"),
        ({**state, "gradkit": {**state["gradkit"], "transforms": "?"}}, "damaged; load another"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
    after = saved(net, optimizer)
    assert str(after) == str(before)


def test_a_bare_checkpoint_of_its_own_form_is_loaded() -> None:
    net = network()
    bare = SlowWeights(momentum(net))
    error(net, BATCHES[0]).backward()
    bare.step()
    optimizer = gk.wrap(SlowWeights(momentum(net)), gk.SAM(), model=net)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.base.count == 1
    ours = optimizer.state_dict()
    SlowWeights(momentum(net)).load_state_dict(ours)  # and the other way round


def test_a_state_dict_that_nothing_can_be_saved_beside_is_refused() -> None:
    class Listing(Several):
        def state_dict(self):
            return [each.state_dict() for each in self.optimizers]

    base = Listing(momentum(network()))
    with pytest.raises(ValueError, match=r"a Listing, is a list,.*; wrap the optimizers inside"):
        gk.wrap(base)


def test_buffers_are_put_back_before_anything_else_can_fail() -> None:
    class Stuck(dict):
        once = False

        def update(self, *items: Any) -> None:
            if self.once:
                raise RuntimeError("stuck")
            Stuck.once = True
            super().update(*items)

    net = network()
    base = SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(), model=net, engine="functional")
    before = {key: (value, value.clone()) for key, value in net.state_dict(keep_vars=True).items()}
    base.state = Stuck()
    with pytest.raises(RuntimeError, match="stuck"):
        optimizer.step(lambda: error(net, BATCHES[0]))
    for key, value in net.state_dict(keep_vars=True).items():
        assert value is before[key][0], key
        assert torch.equal(value, before[key][1]), key


def test_closures_find_the_state_of_the_weights_they_run_on() -> None:
    net = network()
    optimizer = gk.wrap(Properties(momentum(net)), gk.SAM(), model=net, engine="functional")
    take(net, optimizer, BATCHES[:1])
    order, found = list(optimizer.state), []

    def closure() -> Tensor:
        found.append([list(optimizer.state[p]) for p in net.parameters()])
        assert list(optimizer.state) == list(net.parameters())
        return error(net, BATCHES[1])

    optimizer.step(closure)
    assert len(found) == 2
    assert found[0] == [["momentum_buffer"]] * 6
    assert all(one is other for one, other in zip(optimizer.state, order, strict=True))


# Further methods of the base.


def schedule_free() -> tuple[nn.Module, Any]:
    net = network()
    return net, gk.wrap(ScheduleFree(net.parameters(), lr=0.1), gk.SAM(rho=0.1), model=net)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_train_and_eval_switch_the_weights(copied: bool, prepared: bool) -> None:
    net, optimizer = schedule_free()
    if copied:
        net, optimizer = pickle.loads(pickle.dumps(copy.deepcopy((net, optimizer))))
    if prepared:
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    start = flat(net.parameters())
    optimizer.train()
    assert torch.equal(flat(net.parameters()), start - 1)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(flat(net.parameters()))
        return error(net, BATCHES[0])

    optimizer.step(closure)
    assert torch.equal(seen[0], start - 1)  # the weights of training
    trained = flat(net.parameters())
    optimizer.eval()
    assert torch.equal(flat(net.parameters()), trained + 1)


def test_other_bases_have_no_train_and_eval() -> None:
    optimizer = gk.wrap(momentum(network()))
    for name in ("train", "eval", "swap", "_step_supports_amp_scaling", "inner"):
        assert not hasattr(optimizer, name)
        with pytest.raises(AttributeError, match=f"'GradientOptimizer' object has no .*{name}"):
            getattr(optimizer, name)
    assert not hasattr(gk.wrap(Properties(momentum(network()))), "inner")


def test_a_step_in_evaluation_mode_keeps_the_bases_error_and_changes_nothing() -> None:
    net, optimizer = schedule_free()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        optimizer.step(lambda: error(net, BATCHES[0]))
    assert str((net.state_dict(), optimizer.state_dict())) == str(before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# What is refused.


class SamLike(SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


class Closing(SGD):
    def step(self, closure):
        pass


class Raising(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        """Needs one."""
        if closure is None:
            raise RuntimeError("closure, please")


class Asserting(SGD):
    def step(self, closure=None):
        assert closure is not None, "closure, please"


class Reckoning(SGD):
    def step(self, closure=None):
        loss = 0.0
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.param_groups[0]["lr"] = min(1.0, 0.1 * loss)
        return super().step()


class Curved(SGD):
    is_second_order = True

    def step(self, closure=None):
        pass


class Stepless(Optimizer):
    pass


class Copying(Properties):
    @property
    def param_groups(self):
        return [dict(group) for group in self.inner.param_groups]


class Scaling(SGD):
    def backward(self, loss):
        (2 * loss).backward()


class Optional(SGD):
    """Takes more than a closure, and can do without."""

    def step(self, closure=None, *, scale=1.0, **more):
        loss = None
        if closure is None and scale < 0:
            raise ValueError("scale")
        if closure is not None:
            loss = closure()
        self.last = loss
        super().step()
        return float(loss) if loss is not None else loss


def every(net: nn.Module) -> list[nn.Parameter]:
    return list(net.parameters())


NEEDS = "cannot step without a closure"
POINTS = r"other weights inside its own step.*; wrap the optimizer inside it, and pass gk.SAM\(\)"
HESSIAN = "differentiates gradients again.*; wrap a first-order optimizer"
BACKWARD = "calls backward itself"
REFUSED: dict[str, tuple[Make, str]] = {
    "SAM-like": (lambda net: SamLike(every(net), lr=0.1), POINTS),
    "a closure without a default": (lambda net: Closing(every(net), lr=0.1), NEEDS),
    "raising without a closure": (lambda net: Raising(every(net), lr=0.1), NEEDS),
    "asserting a closure": (lambda net: Asserting(every(net), lr=0.1), NEEDS),
    "reckoning with the loss": (lambda net: Reckoning(every(net), lr=0.1), "decide on the step"),
    "second order": (lambda net: Curved(every(net), lr=0.1), HESSIAN),
    "no step": (lambda net: Stepless(every(net), {}), "has no step of its own; wrap"),
    "copies of groups": (lambda net: Copying(momentum(net)), "no param_groups that could be wri"),
    "own backward": (lambda net: Scaling(every(net), lr=0.1), BACKWARD),
    "LOMO": (lambda net: po.LOMO(net), BACKWARD),
    "SafeFP16Optimizer": (lambda net: po.SafeFP16Optimizer(momentum(net)), BACKWARD),
    "AliG": (lambda net: po.AliG(every(net)), NEEDS),
    "AdaHessian": (lambda net: po.AdaHessian(every(net)), HESSIAN),
    "SophiaH": (lambda net: po.SophiaH(every(net)), HESSIAN),
    "SAM": (lambda net: po.SAM(every(net), SGD, lr=0.1), POINTS),
    "WSAM": (lambda net: po.WSAM(net, every(net), SGD, lr=0.1), POINTS),
    "BSAM": (lambda net: po.BSAM(every(net), num_data=8), POINTS),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    net = network()
    base = make(net)
    before = str(base.__dict__)
    with pytest.raises(ValueError, match=f"base is of the class {type(base).__name__}, which .*"):
        gk.wrap(base, model=net)
    with pytest.raises(ValueError, match=message):
        gk.wrap(base, gk.SAM(), model=net)
    assert str(base.__dict__) == before


def test_further_arguments_of_step_are_no_reason() -> None:
    net = network()
    optimizer = gk.wrap(Optional(net.parameters(), lr=0.1), gk.SAM(rho=0.1), model=net)
    assert not torch.equal(take(net, optimizer, BATCHES[:1]), flat(network().parameters()))


def test_a_trainers_optimizer_that_accumulates_is_refused() -> None:
    net = network()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared = accelerator.prepare_optimizer(momentum(net))
    try:
        with pytest.raises(ValueError, match=r"AcceleratedOptimizer.*; wrap the optimizer itself"):
            gk.wrap(prepared, model=net)
    finally:
        accelerator.gradient_accumulation_steps = 1
    optimizer = gk.wrap(prepared, model=net)
    assert not torch.equal(take(net, optimizer, BATCHES[:1]), flat(network().parameters()))


DIFFERENTIABLE = r"group (\d) of the SGD has differentiable=True.*; pass differentiable=False"


def test_no_group_may_be_differentiable() -> None:
    net = network()
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[3].parameters())}]
    groups[1]["differentiable"] = True
    with pytest.raises(ValueError, match=DIFFERENTIABLE.replace(r"\d", "1")):
        gk.wrap(SGD(groups, lr=0.1))
    optimizer = gk.wrap(SGD(net[0].parameters(), lr=0.1, momentum=0.9), model=net)
    with pytest.raises(ValueError, match=DIFFERENTIABLE.replace(r"\d", "1")):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["differentiable"] = True
    with pytest.raises(ValueError, match=DIFFERENTIABLE.replace(r"\d", "0")):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["differentiable"] is False
    optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(ValueError, match=DIFFERENTIABLE.replace(r"\d", "0")):
        optimizer.step(lambda: error(net, BATCHES[0]))
    assert torch.equal(flat(net.parameters()), flat(network().parameters()))


def test_a_learning_rate_of_none_cannot_be_scaled() -> None:
    net = network()
    optimizer = gk.wrap(SGD(net.parameters(), lr=0.1), gk.CosineLR("a", "b"), model=net)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"group 0 .* has no learning rate 'lr' that a transform"):
        take(net, optimizer, BATCHES[:1])


# Everything that pytorch_optimizer offers.

# They need another package, several processes, or arguments of their own kind.
SPECIAL = {"DeMo", "DistributedMuon", "GSAM", "BSAM"}
REFUSED_THERE = {
    "AdaHessian", "AdaLOMO", "AliG", "EmoFact", "EmoLynx", "EmoNavi", "FriendlySAM", "LBFGS",
    "LOMO", "LookSAM", "SAM", "SafeFP16Optimizer", "SophiaH", "WSAM",
}  # fmt: skip
MUON = {"AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"}
NAMES = sorted(
    name
    for name, item in vars(po).items()
    if isinstance(item, type) and issubclass(item, Optimizer) and name not in ("Optimizer",)
)


def built(name: str, net: nn.Module) -> Optimizer:
    kind = getattr(po, name)
    known = list(inspect.signature(kind).parameters)
    if "optimizer" in known:
        return kind(momentum(net))
    if name in MUON:
        matrices = [p for p in net.parameters() if p.dim() == 2]
        others = [p for p in net.parameters() if p.dim() != 2]
        return kind([{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}])
    every = list(net.parameters())
    if name == "SpectralSphere":
        every = [p for p in every if p.dim() == 2]
    if known[0] == "model":
        return kind(net, every, SGD, lr=0.1) if "base_optimizer" in known else kind(net)
    options: dict[str, Any] = {"base_optimizer": SGD, "lr": 0.1}
    if "num_iterations" in known:
        options |= {"num_iterations": 10, "lr": 0.01}
    return kind(every, **{key: value for key, value in options.items() if key in known})


def their_steps(name: str, net: nn.Module, wrap: bool) -> Tensor:
    torch.manual_seed(0)
    base = built(name, net)
    optimizer = ready(gk.wrap(base, model=net) if wrap else base)
    torch.manual_seed(1)
    random.seed(1)  # Sara draws from Python's, Kron from NumPy's
    np.random.seed(1)  # noqa: NPY002 (the state that Kron draws from is the legacy one)
    for inputs, targets in BATCHES[:3]:

        def closure() -> Tensor:
            loss = error(net, (inputs.float(), targets.float()))
            if not wrap:
                optimizer.zero_grad()
                loss.backward()
            return loss

        optimizer.step(closure)
    return flat(net.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_each_of_pytorch_optimizer_steps_as_bare_or_is_refused(part: int) -> None:
    stepped = 0
    for name in NAMES[part::4]:
        if name in SPECIAL:
            continue
        if name in REFUSED_THERE:
            with pytest.raises(ValueError, match=f"base is of the class {name}, which"):
                their_steps(name, network().float(), wrap=True)
            continue
        ours = their_steps(name, network().float(), wrap=True)
        assert torch.equal(ours, their_steps(name, network().float(), wrap=False)), name
        stepped += 1
    assert stepped > 20
