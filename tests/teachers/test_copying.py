"""Which students are copied, how, and which are refused."""

import copy
import warnings

import pytest
import torch
from helpers import seeded
from torch import nn
from torch.nn.utils import parametrizations, prune

import gradkit as gk


def wrapped(student, transform, trained=None, lr=0.1, **options):
    parameters = [p for p in student.parameters() if p.requires_grad]
    base = torch.optim.SGD(parameters if trained is None else trained, lr=lr)
    return gk.wrap(base, transform, model=student, **{"engine": "inplace", **options})


X = torch.randn(4, 3, generator=seeded(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
        lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
        lambda: parametrizations.orthogonal(nn.Linear(3, 2)),
    ],
)
def test_parametrized_modules_follow_by_their_original_weights(make):
    student = make()
    ema = gk.EMA(student, decay=0.9)
    averaged = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    averaged.n_averaged += 1  # past its first update, which only copies
    optimizer = wrapped(student, ema)
    for _ in range(3):
        optimizer.step(lambda: student(X).square().mean())
        averaged.update_parameters(student)
    mine, theirs = dict(ema.teacher.named_parameters()), averaged.module.named_parameters()
    for name, value in theirs:
        assert torch.equal(mine[name], value), name
    for mine, theirs in zip(ema.teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.isfinite(ema.teacher(X)).all()


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
        old_weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_a_student_whose_weight_is_computed_by_a_hook_is_copied(change):
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    change(student[0])
    student(X)
    ema = gk.EMA(student, decay=0.5)
    optimizer = wrapped(student, ema)
    starts = {name: each.detach().clone() for name, each in student.named_parameters()}
    for _ in range(2):
        optimizer.step(lambda: student(X).square().mean())
    assert starts.keys() == dict(ema.teacher.named_parameters()).keys()
    for name, own in ema.teacher.named_parameters():
        assert not own.requires_grad
        assert not torch.equal(own, starts[name]), name
    assert not ema.teacher(X).requires_grad
    # The hook has computed the weight from the averages, not from the student's.
    with torch.no_grad():
        twin = copy.deepcopy(ema.teacher)
        student.load_state_dict(twin.state_dict())
        torch.testing.assert_close(ema.teacher.eval()(X), student.eval()(X))


def test_a_student_that_cannot_be_copied_asks_for_a_teacher():
    student = nn.Linear(3, 2)
    student.lock = (each for each in ())  # as little to be copied as a lock or a file
    with pytest.raises(ValueError, match=r"cannot be copied .*pass it as teacher="):
        gk.EMA(student, decay=0.9)
    assert gk.EMA(student, nn.Linear(3, 2), decay=0.9).teacher is not student


def test_a_lazy_student_is_refused():
    with pytest.raises(ValueError, match="'weight' is not initialised yet; run one forward"):
        gk.EMA(nn.LazyLinear(2), decay=0.9)


def test_a_weight_made_in_inference_mode_or_expanded_gets_memory_of_its_own():
    student = nn.Linear(3, 2)
    with torch.inference_mode():
        value = torch.ones(2)
    student.register_parameter("made", nn.Parameter(value, requires_grad=False))
    student.register_parameter("one", nn.Parameter(torch.ones(1).expand(4), requires_grad=False))
    ema = gk.EMA(student, decay=0.5)
    optimizer = wrapped(student, ema)
    student.one.data = torch.zeros(1).expand(4)
    optimizer.step(lambda: student(X).square().mean())
    assert ema.teacher.one.tolist() == [0.5] * 4
    assert ema.teacher.made.tolist() == [1.0, 1.0]


# What a student must be.


def test_a_student_that_is_not_trained_is_refused():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    for transform in (gk.EMA(other, decay=0.9), gk.GatedEMA(other)):
        with pytest.raises(ValueError, match="holds none of the parameters that the base"):
            gk.wrap(base, transform, model=net)
    assert "gradkit" not in base.param_groups[0]


def test_any_transform_with_a_student_is_checked():
    class Own(gk.Transform):
        def __init__(self, student):
            self.student = student

    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass Own the module that is trained"):
        gk.wrap(base, Own(other))
    gk.wrap(base, Own(net))


def test_a_compiled_student_is_followed_by_a_plain_teacher():
    net = nn.Linear(3, 2)
    student = torch.compile(net, backend="eager")
    ema = gk.EMA(student, decay=0.5)
    assert ema.teacher.state_dict().keys() == net.state_dict().keys()
    start = net.weight.detach().clone()
    optimizer = gk.wrap(torch.optim.SGD(net.parameters(), lr=0.1), ema, model=net)
    optimizer.step(lambda: net(X).square().mean())
    torch.testing.assert_close(ema.teacher.weight.data, 0.5 * start + 0.5 * net.weight.data)
    gk.EMA(student, nn.Linear(3, 2), decay=0.5)
