"""GraTa with any two of six objectives."""

import pytest
import torch

from examples.fundus.network import ResUNet34
from examples.fundus.objectives import OBJECTIVES, build_grata, build_objective
from gradkit import tta


@pytest.fixture(scope="module")
def headed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResUNet34(2, auxiliary_heads=True).eval()


def images(count, size=128):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, 1, 3, size, size, generator=generator)


def test_by_default_it_is_grata_itself(headed):
    plain = tta.GraTa(headed, lr=1e-2, generator=torch.Generator().manual_seed(7))
    built = build_grata(headed, lr=1e-2, seed=7)
    for x in images(2):
        assert torch.equal(built(x), plain(x))


@pytest.mark.parametrize(
    ("pseudo", "auxiliary"), list(zip(OBJECTIVES, OBJECTIVES[1:] + OBJECTIVES[:1], strict=True))
)
def test_each_objective_in_each_place_takes_the_step_of_its_gradients(headed, pseudo, auxiliary):
    """Adam's with a learning rate of ¼(1 + cos)², with both gradients computed by themselves."""
    x = images(1)[0]
    adapter = build_grata(headed, pseudo, auxiliary, lr=1e-2, seed=5)
    twin = tta.Adapter(  # the same network and statistics; its step is made by hand
        headed,
        statistics="test",
        objectives={"loss": tta.entropy},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    trained = list(twin.trained().values())
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 6))

    def gradient(name, generator):
        loss = build_objective(name, generator)(twin.model, x)
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)
        ]

    a = gradient(auxiliary, other)
    with torch.no_grad():
        for parameter, part in zip(trained, a, strict=True):
            parameter -= part
    p = gradient(pseudo, one)
    flat = [torch.cat([part.flatten() for part in each]).double() for each in (a, p)]
    cosine = float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))

    adapter(x)
    step = adapter.last_step
    assert step.applied
    assert step.cosine("pseudo", "auxiliary").item() == pytest.approx(cosine, abs=1e-4)
    before = dict(headed.named_parameters())
    moved = 0
    for (name, parameter), g in zip(adapter.trained().items(), p, strict=True):
        # Adam's first step is the learning rate times the sign of the gradient.
        change = parameter - before[name]
        clear = g.abs() > 1e-5
        torch.testing.assert_close(
            change[clear], -1e-2 * (1 + cosine) ** 2 / 4 * g.sign()[clear], rtol=2e-2, atol=1e-6
        )
        moved += int(clear.sum())
    assert moved > 100


def test_each_objective_draws_its_own_numbers(headed):
    adapter = build_grata(headed, "den", "den", seed=1)
    x = images(1)[0]
    pseudo, auxiliary = adapter.objectives["pseudo"], adapter.objectives["auxiliary"]
    assert pseudo(adapter.model, x) != auxiliary(adapter.model, x)
    other = build_grata(headed, "den", "den", seed=2).objectives["pseudo"]
    assert pseudo(adapter.model, x) != other(adapter.model, x)


def test_bad_arguments(headed):
    alone = headed.without_heads()
    with pytest.raises(ValueError, match="rec and ent need a network with auxiliary heads; train"):
        build_grata(alone, "rec")
    with pytest.raises(ValueError, match="con and den need a network with auxiliary heads"):
        build_grata(alone, "con", "den")
    with pytest.raises(ValueError, match="there is no objective 'jig'; choose one of con, ent"):
        build_grata(headed, "jig")
    with pytest.raises(ValueError, match="choose source, test, or mixed:SHARE"):
        build_grata(headed, statistics="mine")
