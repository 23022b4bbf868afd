"""The wrapped optimizer beside the bare one, and what it promises about each step."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from children import run_python
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradkit as gk
from gradkit.optimizer import finite_check

ENGINES = ["functional", "inplace"]
PLAIN_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, fused=True),
    "Adam-single": lambda p: torch.optim.Adam(p, foreach=False, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
if hasattr(torch.optim, "Muon"):
    PLAIN_OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2])
REFUSED = {"LBFGS", "SparseAdam"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


INPUT = torch.arange(12.0).reshape(4, 3).cos()


def test_every_optimizer_of_torch_is_covered() -> None:
    classes = {
        name
        for name, item in vars(torch.optim).items()
        if isinstance(item, type) and issubclass(item, torch.optim.Optimizer)
    }
    covered = {name.partition("-")[0] for name in PLAIN_OPTIMIZERS}
    assert classes - {"Optimizer"} == covered | REFUSED


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PLAIN_OPTIMIZERS)
def test_without_transforms_it_equals_the_bare_optimizer(name: str, engine: str) -> None:
    bare_model, wrapped_model = network(), network()
    bare = PLAIN_OPTIMIZERS[name](list(bare_model.parameters()))
    base = PLAIN_OPTIMIZERS[name](list(wrapped_model.parameters()))
    wrapped = gk.wrap(base, model=wrapped_model, engine=engine)
    for _ in range(5):
        bare.zero_grad()
        loss = bare_model(INPUT).square().mean()
        loss.backward()
        bare.step()
        assert wrapped.step(lambda: wrapped_model(INPUT).square().mean()) == loss.detach()
    for key, value in bare_model.state_dict().items():
        assert torch.equal(value, wrapped_model.state_dict()[key]), key
    ours = wrapped.state_dict()
    assert ours["param_groups"][0].pop("gradkit")
    for key, state in bare.state_dict()["state"].items():
        for part, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours["state"][key][part]))
    assert ours["param_groups"] == bare.state_dict()["param_groups"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (lambda: torch.tensor(1.0), "the closure produced no gradient"),
        (lambda: None, "the closure produced no gradient"),
        ({"a": lambda: torch.tensor(1.0)}, "objective 'a' produced no gradient"),
    ],
)
def test_no_gradient_at_all(objectives, message: str, engine: str) -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=f"nothing to step on: .*{message}"):
        optimizer.step(objectives)
    assert not optimizer.last_step.applied
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_grad_after_a_step_is_the_applied_direction(engine: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("a", "b", "both", "no")})
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1),
        gk.LookAhead(along="b", update="a", step_size=0.5),
        model=model,
        engine=engine,
    )
    x = torch.tensor([1.0, 2.0])
    optimizer.step(
        {
            "a": lambda: (model["a"](x) + model["both"](x)).square().sum(),
            "b": lambda: (model["b"](x) + model["both"](x)).square().sum(),
        }
    )
    assert model["b"].weight.grad is None  # reached by the observer only
    assert model["no"].weight.grad is None
    assert model["a"].weight.grad is not None
    assert model["both"].weight.grad is not None


def test_old_gradients_are_never_written_to() -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), model=model)
    objectives = {"a": lambda: model(INPUT).sum(), "b": lambda: -model(INPUT).square().sum()}
    kept, copies = [], []
    for _ in range(4):
        optimizer.step(objectives)
        view = model[0].weight.grad[0].detach()
        kept.append(view)
        copies.append(view.clone())
    assert len({view.data_ptr() for view in kept}) == 4
    for view, value in zip(kept, copies, strict=True):
        assert torch.equal(view, value)


def test_buffers_of_flat_vectors_are_reused() -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1e-4), gk.PCGrad(), model=model)
    objectives = {"a": lambda: model(INPUT).sum(), "b": lambda: -model(INPUT).square().sum()}
    addresses = set()
    for _ in range(6):
        optimizer.zero_grad()
        optimizer.step(objectives)
        addresses.add(optimizer.gradients(objectives).rows.data_ptr())
    assert len(addresses) == 1


def test_without_a_count_of_uses_no_buffer_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As with a torch that has no such count.
    monkeypatch.setattr("gradkit.core.flat._use_count", None)
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1e-4), gk.PCGrad(), model=model)
    objectives = {"a": lambda: model(INPUT).sum(), "b": lambda: -model(INPUT).square().sum()}
    kept = [optimizer.gradients(objectives).rows for _ in range(3)]
    assert len({rows.data_ptr() for rows in kept}) == 3
    optimizer.step(objectives)
    assert optimizer.last_step.applied


def test_max_norm_clips_the_final_direction() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), max_norm=1.0)
    optimizer.step({"a": lambda: 3 * weight[0], "b": lambda: 4 * weight[1]})
    assert torch.allclose(weight, torch.tensor([-0.6, -0.8]), atol=1e-5)
    optimizer.step(lambda: weight[0] / 2)
    assert torch.allclose(weight.grad, torch.tensor([0.5, 0.0]))


def test_every_group_is_scaled_and_a_shared_tensor_rate_once() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    rate = torch.tensor(1.0)
    base = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=rate)
    optimizer = gk.wrap(base, gk.CosineLR("a", "b", activation=lambda c: torch.full_like(c, 0.5)))
    optimizer.step({"a": lambda: (first + second).sum(), "b": lambda: (first + second).sum()})
    assert first.item() == second.item() == -1.0  # 0.5 of the sum of two gradients of 1
    assert base.param_groups[1]["lr"] is rate
    assert rate.item() == 1.0


def test_the_learning_rate_comes_back_when_the_base_raises() -> None:
    weight = nn.Parameter(torch.zeros(1))

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("broken base")

    optimizer = gk.wrap(
        Broken([weight], lr=1.0), gk.CosineLR("a", "b", activation=lambda c: c * 0 + 0.5)
    )
    weight.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="broken base"):
        optimizer.step({"a": lambda: weight.sum(), "b": lambda: weight.sum()})
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert torch.equal(weight.grad, torch.ones(1))


def test_a_state_dict_of_the_bare_optimizer_loads() -> None:
    model = network()
    bare = torch.optim.Adam(model.parameters(), lr=0.3)
    model(INPUT).sum().backward()
    bare.step()
    optimizer = gk.wrap(torch.optim.Adam(model.parameters()), gk.PCGrad(), model=model)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert torch.equal(
        optimizer.state[model[0].weight]["exp_avg"], bare.state[model[0].weight]["exp_avg"]
    )


def test_state_of_other_transforms_is_refused_and_changes_nothing() -> None:
    model = network()
    other = gk.wrap(torch.optim.Adam(model.parameters(), lr=0.5), gk.SAM(), model=model)
    optimizer = gk.wrap(torch.optim.Adam(model.parameters(), lr=0.1), gk.PCGrad(), model=model)
    with pytest.raises(ValueError, match=r"of the transforms \(SAM\).*has \(PCGrad\)"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_during_the_base_step_waits_for_the_commit(engine: str) -> None:
    model = network()

    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            signal.raise_signal(signal.SIGINT)
            return super().step(closure)

    teacher = gk.EMA(model, decay=0.5)
    optimizer = gk.wrap(
        Interrupted(model.parameters(), lr=0.1), teacher, model=model, engine=engine
    )
    weight = model[3].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: model(INPUT).square().sum())
    assert not torch.equal(model[3].weight, weight)
    assert torch.allclose(teacher.teacher[3].weight, (weight + model[3].weight) / 2)
    assert model[1].num_batches_tracked == 1
    assert optimizer.last_step.applied
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_inside_a_closure_is_refused(engine: str) -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine)

    def closure():
        optimizer.step(lambda: model(INPUT).sum())

    with pytest.raises(RuntimeError, match="from inside one of its closures"):
        optimizer.step(closure)
    assert optimizer.step(lambda: model(INPUT).sum()) is not None


def test_inference_mode_is_refused() -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step(lambda: model(INPUT).sum())


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for numbers on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.is_nonzero,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("nonfinite", "reads"), [("raise", 1), ("skip", 1), ("ignore", 0)])
def test_host_traffic(
    nonfinite: str, reads: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), foreach=True)
    # The base's own reads are not ours; with a tensor rate torch's may read it.
    monkeypatch.setattr(base, "step", lambda: None)
    optimizer = gk.wrap(
        base,
        gk.PCGrad(),
        gk.LookAhead(along="b", update="a"),
        gk.CosineLR("a", "b"),
        gk.SAM(),
        gk.GatedEMA(model, between=("a", "b")),
        model=model,
        engine=engine,
        nonfinite=nonfinite,
    )
    # On the CPU results are looked at, which costs nothing there and is left out elsewhere.
    monkeypatch.setattr("gradkit.core.gram._in_range", lambda products: True)
    monkeypatch.setattr("gradkit.core.displacement._on_host", lambda value: value)
    monkeypatch.setattr(finite_check, "_read", finite_check._read_at_once)
    counter = HostReads()
    tolist = torch.Tensor.tolist

    def counted(tensor):
        counter.count += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with counter:
        optimizer.step({"a": lambda: model(INPUT).sum(), "b": lambda: model(INPUT).mean()})
    assert counter.count == reads


MEMORY = """
import json, os, sys, torch, torch._dynamo, gradkit as gk
torch.set_num_threads(1)

def run(mode, engine, gradients, width):
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(4)])
    base = torch.optim.SGD(model.parameters(), lr=1e-9)
    x = torch.randn(1, width)
    if mode == "plain":
        def step():
            model(x)[0, 0].backward()
            base.step()
    else:
        transforms, count = {"pcgrad": ((gk.PCGrad(),), 4), "sam": ((gk.SAM(),), 1)}[mode]
        optimizer = gk.wrap(base, *transforms, model=model, engine=engine)
        objectives = {str(k): lambda k=k: model(x)[0, k] for k in range(count)}
        def step():
            optimizer.step(objectives)
    for _ in range(4):
        if gradients == "clear":
            base.zero_grad()
        step()
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(status["VmHWM"].split()[0])

# A peak never falls, but that of a forked process begins with what is resident.
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        tiny, width = run(*arguments, 16), 1600
        print((run(*arguments, width) - tiny) / (4 * 4 * width**2), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
MEMORY_CASES = [
    ("pcgrad", "functional", "keep", 5),  # K + 1
    ("pcgrad", "inplace", "clear", 5),
    ("sam", "functional", "clear", 1),
    ("sam", "functional", "keep", 2),  # and the last step's gradients
    ("sam", "inplace", "keep", 2),
]


@pytest.fixture(scope="module")
def peak_memory() -> dict[tuple[str, ...], float]:
    """The peak resident memory of each run, in units of P numbers."""
    runs = [("plain", "none", "clear"), *(case[:3] for case in MEMORY_CASES)]
    # Large blocks go back to the system at once, so that the peak shows what is held.
    done = run_python("-c", MEMORY, json.dumps(runs), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    return dict(zip(runs, map(float, done.stdout.split()), strict=True))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read there")
@pytest.mark.parametrize(("mode", "engine", "gradients", "most"), MEMORY_CASES)
def test_memory_above_plain_training(
    mode: str,
    engine: str,
    gradients: str,
    most: int,
    peak_memory: dict[tuple[str, ...], float],
) -> None:
    plain = peak_memory["plain", "none", "clear"]
    assert 1.9 < plain < 2.2  # weights and gradients
    # Callers in Python 3.10 keep their arguments, a displacement too, until the call returns.
    kept = mode == "sam" and sys.version_info < (3, 11)
    assert 0.9 < peak_memory[mode, engine, gradients] - plain < most + kept + 0.1


def test_nothing_is_leaked() -> None:
    model = network()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.01), gk.PCGrad(), gk.SAM(), model=model
    )
    objectives = {"a": lambda: model(INPUT).sum(), "b": lambda: model(INPUT).square().sum()}

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    counts = []
    for _ in range(4):
        for _ in range(3):
            optimizer.step(objectives)
        counts.append(tensors())
    assert counts[-1] == counts[1]


def test_repr_shows_the_chain() -> None:
    weight = nn.Parameter(torch.zeros(1))
    base = torch.optim.SGD([weight], lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad(), gk.SAM(rho=0.1))
    text = repr(optimizer)
    assert text.index("SGD") < text.index("PCGrad") < text.index("SAM(rho=0.1)")
    assert text.endswith("SAM(rho=0.1)\n)")


def test_repr_shows_the_options_that_are_not_the_defaults() -> None:
    model = nn.Linear(1, 1)
    scaler = torch.amp.GradScaler("cpu")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(), model=model, max_norm=1.0, nonfinite="skip", scaler=scaler)
    options = ("nonfinite='skip'", "max_norm=1.0", "scaler=GradScaler(...)")
    assert repr(optimizer).endswith(",\n  ".join(("SAM(rho=0.05)", *options)) + "\n)")


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_distributed_checkpoints_carry_all_state(engine: str, flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def make() -> tuple[nn.Module, gk.EMA, gk.GradientOptimizer]:
        model = network()
        ema = gk.EMA(model, decay=0.9, warmup=True)
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, ema, gk.wrap(base, gk.PCGrad(), gk.SAM(), ema, model=model, engine=engine)

    def step(model: nn.Module, optimizer: gk.GradientOptimizer) -> None:
        optimizer.zero_grad()
        optimizer.step({str(k): lambda k=k: (model(INPUT) - k).square().mean() for k in range(3)})

    model, ema, optimizer = make()
    for _ in range(2):
        step(model, optimizer)
    optimizer.zero_grad()
    # Without a file in between, torch would let both optimizers share the very same tensors.
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin, twin_ema, other = make()
    twin.load_state_dict(model.state_dict())
    twin_ema.teacher.load_state_dict(ema.teacher.state_dict())
    set_optimizer_state_dict(twin, other, saved, options=options)
    for each in ((model, optimizer), (twin, other)):
        step(*each)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        ema.teacher.state_dict().values(), twin_ema.teacher.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert twin_ema.state == ema.state == {"t": 3}


@pytest.mark.parametrize("name", ["first_step", "second_step", "pc_backward"])
def test_what_other_wrappers_do_by_hand_is_told(name: str) -> None:
    optimizer = gk.wrap(torch.optim.SGD(network().parameters(), lr=0.1), gk.SAM())
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; pass step.. the closure"):
        getattr(optimizer, name)
