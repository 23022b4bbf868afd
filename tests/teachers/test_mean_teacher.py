"""What teachers have in common: steps that leave them alone, and how they are saved."""

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import seeded
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import gradkit as gk
from teachers.students import student

ENGINES = ["functional", "inplace"]


@pytest.mark.parametrize("make", [gk.EMA, gk.GatedEMA])
def test_the_teacher_is_a_frozen_copy(make):
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    teacher = make(model, **({"decay": 0.9} if make is gk.EMA else {})).teacher
    assert teacher is not model
    for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
        assert not mine.requires_grad
        assert mine.grad is None
        assert theirs.requires_grad
        assert theirs.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [gk.EMA, gk.GatedEMA])
def test_a_skipped_step_changes_nothing(engine, make):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    teacher = make(model, **({"decay": 0.5} if make is gk.EMA else {}))
    optimizer = gk.wrap(
        torch.optim.Adam(model.parameters(), lr=0.1),
        teacher,
        model=model,
        engine=engine,
        nonfinite="skip",
    )
    x = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)

    def objectives(factor):
        return {
            "source": lambda: model(x).square().mean(),
            "target": lambda: factor * model(x).mean(),
        }

    optimizer.step(objectives(1.0))
    before = copy.deepcopy((model.state_dict(), teacher.teacher.state_dict()))
    optimizer.step(objectives(float("nan")))
    assert optimizer.last_step.applied is False
    assert optimizer.last_step.decay is None
    assert teacher.state["t"] == 1
    for module, old in zip((model, teacher.teacher), before, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, old[name]), name
    optimizer.step(objectives(1.0))
    assert optimizer.last_step.applied is True
    assert teacher.state["t"] == 2
    assert not torch.equal(teacher.teacher[0].weight, before[1]["0.weight"])


@pytest.mark.parametrize("make", [gk.EMA, gk.GatedEMA])
def test_a_failed_step_changes_nothing(make):
    model = student(2)
    teacher = make(model, **({"decay": 0.5} if make is gk.EMA else {}))
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), teacher, model=model)

    def fails():
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        optimizer.step({"source": lambda: model[0].sum(), "target": fails})
    assert teacher.state["t"] == 0
    assert teacher.teacher[0].tolist() == [0.0, 0.0]


def test_arguments_are_checked():
    model = student()
    with pytest.raises(ValueError, match=r"decay is 1\.5; a decay lies between 0 and 1"):
        gk.EMA(model, decay=1.5)
    with pytest.raises(ValueError, match=r"decay_aligned is -0\.1; a decay lies between"):
        gk.GatedEMA(model, decay_aligned=-0.1)
    with pytest.raises(ValueError, match=r"decay_conflict is 2\.0; a decay lies between"):
        gk.GatedEMA(model, decay_conflict=2.0)
    with pytest.raises(ValueError, match="name two different objectives"):
        gk.GatedEMA(model, between=("source", "source"))
    with pytest.raises(ValueError, match="teacher and student are the same module"):
        gk.EMA(model, model, decay=0.9)
    with pytest.raises(ValueError, match=r"differ in '0': it has shape \(2,\) in the teacher and"):
        gk.EMA(model, student(2), decay=0.9)


X = torch.randn(4, 3, generator=seeded(0))


class Net(nn.Module):
    """Trained, frozen, unused and integer weights, and buffers of both kinds."""

    def __init__(self, dtype):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.unused = nn.Parameter(torch.randn(2))
        self.to(dtype)
        self.codes = nn.Parameter(torch.randint(9, (2,)).to(torch.int8), requires_grad=False)
        self.register_buffer("fleeting", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.layers(self.frozen(x.to(self.unused.dtype)))


BASES = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}
TEACHERS = {
    "EMA": lambda net, **kw: gk.EMA(net, decay=0.99, warmup=True, **kw),
    "GatedEMA": lambda net, **kw: gk.GatedEMA(net, between=("a", "b"), **kw),
}


def made(dtype=torch.float32, base="Adam", teacher="EMA", seed=0, in_state=True, whole=True):
    """A net, its teacher and its optimizer, all different for each seed."""
    torch.manual_seed(seed)
    net = Net(dtype)
    ema = TEACHERS[teacher](net, in_state=in_state)
    parameters = net.parameters() if whole else net.layers.parameters()
    optimizer = gk.wrap(BASES[base](parameters), gk.PCGrad(), ema, model=net, engine="inplace")
    return net, ema, optimizer


def advance(net, optimizer, steps=3):
    for step in range(steps):
        x = X.roll(step, 0)
        objectives = {
            "a": lambda x=x: net(x).square().mean(),
            "b": lambda x=x: net(x)[:, 0].mean(),
        }
        optimizer.step(objectives)


def bits(tensors):
    flat = {name: each.detach().clone().reshape(-1) for name, each in tensors.items()}
    return {
        name: (str(each.dtype), tensors[name].shape, each.view(torch.uint8).tolist())
        for name, each in flat.items()
    }


def everything(net, ema, optimizer):
    shadows = {
        key.partition(":shadow.")[2]: value
        for state in optimizer.state_dict()["state"].values()
        for key, value in state.items()
        if ":shadow." in key
    }
    return {
        "net": bits(net.state_dict()),
        "teacher": bits(ema.teacher.state_dict()),
        "shadows": bits(shadows),
        "t": ema.state["t"],
    }


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_model_and_optimizer_bring_the_teacher_back(dtype, base, teacher, steps):
    first = made(dtype, base, teacher)
    advance(first[0], first[2], steps)
    saved = through_a_file({"net": first[0].state_dict(), "optimizer": first[2].state_dict()})
    second = made(dtype, base, teacher, seed=1)
    advance(second[0], second[2], 1)
    assert everything(*second)["teacher"] != everything(*first)["teacher"]
    second[0].load_state_dict(saved["net"])
    second[2].load_state_dict(saved["optimizer"])
    assert everything(*second) == everything(*first)
    for each in (first, second):
        each[2].zero_grad()
        advance(each[0], each[2], 3)
    assert everything(*second) == everything(*first)
    if dtype == torch.bfloat16:
        assert everything(*first)["shadows"]


def test_what_the_optimizer_does_not_hold_is_saved_too():
    first = made(whole=False)
    with torch.no_grad():
        first[1].teacher.frozen.weight.add_(1)
    advance(first[0], first[2])
    second = made(whole=False, seed=1)
    second[2].load_state_dict(through_a_file(first[2].state_dict()))
    assert everything(*second)["teacher"] == everything(*first)["teacher"]


def test_the_saved_state_is_no_alias_of_the_loaded_one():
    first, second = made(torch.bfloat16), made(torch.bfloat16, seed=1)
    advance(first[0], first[2])
    second[2].load_state_dict(first[2].state_dict())
    kept = everything(*first)
    advance(second[0], second[2])
    assert everything(*first) == kept


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_have_teachers_of_their_own(dtype, how):
    net, ema, optimizer = made(dtype)
    advance(net, optimizer)
    both = (net, optimizer)
    twin_net, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    twin_ema = twin.transforms[1]
    for each, its in ((net, optimizer), (twin_net, twin)):
        its.zero_grad()
        advance(each, its)
    assert everything(twin_net, twin_ema, twin) == everything(net, ema, optimizer)
    advance(twin_net, twin)
    assert everything(twin_net, twin_ema, twin) != everything(net, ema, optimizer)
    state = {
        key: value for held in twin.state_dict()["state"].values() for key, value in held.items()
    }
    assert torch.equal(
        state["gradkit.1:teacher.layers.0.weight"], twin_ema.teacher.layers[0].weight
    )


def test_state_follows_buffers_that_are_replaced_and_frozen_parameters():
    net, ema, optimizer = made()
    advance(net, optimizer)
    net.layers[1].register_buffer("grown", torch.ones(5))
    net.frozen.requires_grad_(True)
    net.layers[0].requires_grad_(False)
    advance(net, optimizer)
    other_net, other_ema, other = made(seed=1)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (
        everything(other_net, other_ema, other)["teacher"]
        == (everything(net, ema, optimizer)["teacher"])
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_checkpoint_brings_the_teacher_back(dtype, base, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    first = made(dtype, base)
    first[0].unused.requires_grad_(False)  # such a checkpoint wants a gradient for every other
    advance(first[0], first[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no other ranks
        weights, state = get_state_dict(first[0], first[2], options=options)
        dcp.save({"net": weights, "optimizer": state}, checkpoint_id=tmp_path)
        second = made(dtype, base, seed=1)
        second[0].unused.requires_grad_(False)
        weights, state = get_state_dict(second[0], second[2], options=options)
        saved = {"net": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=tmp_path)
        set_state_dict(
            second[0],
            second[2],
            model_state_dict=saved["net"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
    assert everything(*second) == everything(*first)
    for each in (first, second):
        each[2].zero_grad()
        advance(each[0], each[2])
    assert everything(*second) == everything(*first)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    first = made()
    advance(first[0], first[2])
    state = first[2].state_dict()
    second = made(seed=1)
    advance(second[0], second[2], 1)
    place = second[2].state_dict()["state"]
    before = everything(*second)
    name = "gradkit.1:teacher.layers.0.weight"
    holder = next(key for key, held in state["state"].items() if name in held)
    assert name in place[holder]

    def refused(change, message):
        wrong = copy.deepcopy(state)
        change(wrong["state"])
        with pytest.raises(ValueError, match=message):
            second[2].load_state_dict(wrong)
        assert everything(*second) == before

    refused(lambda s: s[holder].update({name: torch.zeros(1)}), r"has shape \(1,\) where")
    refused(lambda s: s[holder].pop(name), "has no 'layers.0.weight' and this one has")
    refused(
        lambda s: s[holder].update({"gradkit.1:teacher.other": torch.zeros(1)}),
        "the saved teacher has 'other' and this one has not",
    )


def test_the_state_of_a_teacher_is_taken_over_whatever_in_state_says_here():
    first, second = made(), made(seed=1, in_state=False)
    advance(first[0], first[2])
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(through_a_file(first[2].state_dict()))
    assert everything(*second) == everything(*first)
    advance(second[0], second[2], 1)  # no warning


def test_the_state_shows_what_the_teacher_is():
    """At any time, since distributed checkpoints look at it themselves."""
    net, ema, optimizer = made(torch.bfloat16)
    advance(net, optimizer, 2)
    shown = optimizer.state[net.layers[0].weight]
    advance(net, optimizer, 2)
    assert torch.equal(shown["gradkit.1:teacher.layers.0.weight"], ema.teacher.layers[0].weight)
    own = shown["gradkit.1:shadow.layers.0.weight"]
    assert torch.equal(own.bfloat16(), ema.teacher.layers[0].weight)
    assert not torch.equal(own, own.bfloat16().float())
    assert not optimizer.state.get(net.unused)


def test_without_in_state_nothing_is_added_for_ordinary_models():
    net, _, optimizer = made(in_state=False)
    advance(net, optimizer)
    keys = {key for state in optimizer.state_dict()["state"].values() for key in state}
    assert keys == {"step", "exp_avg", "exp_avg_sq"}


# The warning.

WARNING = "is not the one that was saved with the optimizer's state.*in_state=True"


def resumed(first, load, dtype=torch.float32, **arguments):
    saved = through_a_file(
        {
            "net": first[0].state_dict(),
            "teacher": first[1].teacher.state_dict(),
            "optimizer": first[2].state_dict(),
        }
    )
    second = made(dtype, seed=1, in_state=False, **arguments)
    parts = {"net": second[0], "teacher": second[1].teacher, "optimizer": second[2]}
    for name in load:
        parts[name].load_state_dict(saved[name])
    return second


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_was_not_loaded_is_warned_of_once(dtype, teacher):
    first = made(dtype, teacher=teacher, in_state=False)
    advance(first[0], first[2])
    with pytest.warns(UserWarning, match=WARNING):
        second = resumed(first, ("net", "optimizer"), dtype, teacher=teacher)
    advance(second[0], second[2])  # it is said once


def test_a_warning_that_is_an_error_comes_once_all_is_loaded():
    first = made(in_state=False)
    advance(first[0], first[2])
    other = made(seed=2, in_state=False)
    with pytest.raises(UserWarning, match=WARNING):
        other[2].load_state_dict(first[2].state_dict())
    assert other[1].state == first[1].state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "order", [("teacher", "net", "optimizer"), ("optimizer", "net", "teacher")]
)
def test_a_teacher_may_be_loaded_in_any_order_and_first_without_a_warning(order, dtype):
    first = made(dtype, in_state=False)
    advance(first[0], first[2])
    with contextlib.ExitStack() as stack:
        if order[0] != "teacher":
            stack.enter_context(pytest.warns(UserWarning, match="unless it is still to be loaded"))
        second = resumed(first, order, dtype)
    for each in (first, second):
        each[2].zero_grad()
        advance(each[0], each[2])
    assert everything(*second) == everything(*first)


def test_states_without_a_teachers_mark_load_as_before():
    first = made(in_state=False)
    advance(first[0], first[2])
    state = copy.deepcopy(first[2].state_dict())
    text = state["param_groups"][0]["gradkit"]
    assert '"mark": "' in text
    cut = text.split(', "mark": "')
    state["param_groups"][0]["gradkit"] = cut[0] + cut[1][cut[1].index('"') + 1 :]
    second = made(seed=1, in_state=False)
    second[2].load_state_dict(state)
    advance(second[0], second[2], 1)
    bare = torch.optim.Adam(made()[0].parameters(), lr=0.05)
    second[2].load_state_dict(bare.state_dict())
    advance(second[0], second[2], 1)


def test_the_ranks_text_does_not_depend_on_who_saved():
    """Only the rank that writes a checkpoint calls state_dict()."""
    from gradkit.optimizer import state

    net, _, optimizer = made(in_state=False)
    advance(net, optimizer)
    before = state.encode(optimizer.transforms)
    optimizer.state_dict()
    assert state.encode(optimizer.transforms) == before


@pytest.mark.parametrize("in_state", [False, True])
def test_an_adapter_goes_back_to_its_teacher_without_a_warning(in_state):
    source = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).bfloat16()
    adapter = gk.tta.Adapter(
        source,
        objectives={"loss": lambda model, images: model(images).float().square().mean()},
        transforms=lambda model: (gk.EMA(model, decay=0.5, in_state=in_state),),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )
    images = torch.rand(2, 1, 4, 4, generator=seeded(1)).bfloat16()
    ema = adapter.optimizer.transforms[0]
    adapter(images)
    once = bits(ema.teacher.state_dict())
    kept = adapter.state_dict()
    adapter(images)
    twice = bits(ema.teacher.state_dict())
    adapter.reset()
    adapter(images)
    assert bits(ema.teacher.state_dict()) == once
    adapter.load_state_dict(kept)
    adapter(images)
    assert bits(ema.teacher.state_dict()) == twice
