"""Running statistics that learn, beside torch's BatchNorm and plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkit as gk
from gradkit.tta.running import RunningStatistics, learning
from gradkit.tta.statistics import install_statistics
from tta.references import images, network


class Cast(nn.BatchNorm2d):
    """Normalises by converted copies of its statistics."""

    def forward(self, x):
        mean, var = self.running_mean.float(), self.running_var.float()
        return F.batch_norm(x.float(), mean, var, self.weight.float(), self.bias.float()).to(x)


def test_it_is_batch_normalisation_in_training() -> None:
    mine, torchs = install_statistics(network(), RunningStatistics(0.1)), network()
    mine.eval()
    torchs.eval()
    for layer in (torchs[1], torchs[5]):
        layer.train()
    for x in images(3):
        with learning(mine):
            learnt = mine(x)
        torch.testing.assert_close(learnt, torchs(x), rtol=1e-12, atol=1e-12)
        for name in ("1", "5"):
            here, there = mine.get_submodule(name), torchs.get_submodule(name)
            torch.testing.assert_close(here.running_mean, there.running_mean)
            torch.testing.assert_close(here.running_var, there.running_var)
    torchs.eval()
    for _ in range(2):  # without learning nothing changes
        torch.testing.assert_close(mine(x), torchs(x), rtol=1e-12, atol=1e-12)


def test_moved_statistics_are_used_and_have_gradients() -> None:
    layer = install_statistics(nn.BatchNorm2d(2), RunningStatistics(0.25, uses_moved=True)).double()
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    with learning(layer):
        y = layer(x)
    mean = 0.25 * x.mean(dim=(0, 2, 3))
    var = 0.75 + 0.25 * ((x - x.mean(dim=(0, 2, 3), keepdim=True)) ** 2).mean(dim=(0, 2, 3))
    expected = (x - mean.view(1, 2, 1, 1)) / (var + 1e-5).sqrt().view(1, 2, 1, 1)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    (mine,) = torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.pow(3).sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_a_layer_moves_once_and_the_rest_can_follow() -> None:
    model = install_statistics(network(), RunningStatistics(0.1))
    model.eval()
    x = images(1)[0]
    with torch.no_grad(), learning(model) as waiting:
        model[:4](x)
        first = model[1].running_mean.clone()
        assert waiting == {"5"}
        model(x)
        assert waiting == set()
    assert torch.equal(model[1].running_mean, first)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), learning(model):
        raise ZeroDivisionError
    model(x)
    assert torch.equal(model[1].running_mean, first)


def test_a_layer_with_a_forward_of_its_own_keeps_what_it_learns() -> None:
    plain, cast = nn.Sequential(nn.BatchNorm2d(2)).double(), nn.Sequential(Cast(2)).double()
    x = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    for model in (plain, cast):
        install_statistics(model, RunningStatistics(0.5))
        with learning(model):
            model(x)
    torch.testing.assert_close(cast[0].running_var, plain[0].running_var, rtol=1e-6, atol=1e-6)
    assert not torch.equal(plain[0].running_var, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("engine", ["inplace", "functional"])
def test_a_step_commits_the_first_evaluation_and_a_failed_one_nothing(engine: str) -> None:
    fail = False

    def objective(model, x):
        with learning(model):
            loss = gk.tta.entropy(model, x)
        return loss * torch.nan if fail else loss

    adapter = gk.tta.Adapter(
        network(),
        statistics=RunningStatistics(0.1),
        objectives={"loss": objective},
        transforms=(gk.SAM(rho=0.5),),  # evaluates twice
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        engine=engine,
        nonfinite="skip",
    )
    reference = network().eval()
    reference[1].train()
    reference[5].train()
    x = images(1)[0]
    adapter(x)
    reference(x)
    torch.testing.assert_close(adapter.model[5].running_var, reference[5].running_var)
    before, fail = gk.testing.bits(adapter.state_dict()), True
    adapter(x)
    assert not adapter.last_step.applied
    assert gk.testing.bits(adapter.state_dict()) == before


def test_a_teacher_has_statistics_of_its_own() -> None:
    student = install_statistics(network(), RunningStatistics(0.1, uses_moved=True)).eval()
    ema = gk.EMA(student, decay=0.9, buffers="skip")
    optimizer = gk.wrap(torch.optim.SGD(student.parameters(), lr=0.1), ema, model=student)
    x, y = images(2)
    source = copy.deepcopy(student[1].running_mean)
    with torch.no_grad(), learning(ema.teacher):
        ema.teacher(x)
    moved = ema.teacher[1].running_mean.clone()
    assert not torch.equal(moved, source)
    assert torch.equal(student[1].running_mean, source)

    def loss():
        with learning(student):
            return student(y).square().mean()

    optimizer.step(loss)
    assert torch.equal(ema.teacher[1].running_mean, moved)
    assert not torch.equal(student[1].running_mean, moved)
    assert not torch.equal(student[1].running_mean, source)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="momentum is 1"):
        RunningStatistics(1.5)
    model = install_statistics(nn.Sequential(nn.BatchNorm1d(2)), RunningStatistics())
    with pytest.raises(ValueError, match="at least 2 values"), learning(model):
        model(torch.rand(1, 2))
