"""What holds of every method as a transform: the optimizer contract, resumption, failures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import as_users_run_it, flat, seeded
from torch import Tensor, nn

import gradkit as gk
from gradkit.surgery import Rule
from surgery.methods import METHODS, made

every_method = pytest.mark.parametrize("name", METHODS)
every_engine = pytest.mark.parametrize("engine", ["functional", "inplace"])
# One engine each, since both tests are long; between them they see both.
CONTRACT = {
    name: "inplace" if isinstance(made(name, 3), Rule) else "functional" for name in METHODS
}
FAILURE = {name: {"inplace": "functional"}.get(CONTRACT[name], "inplace") for name in METHODS}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks of types, which other tests of the same methods make, take most of the time here."""
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda *, typechecker: lambda function: function)
    with as_users_run_it():
        yield


class Run:
    """A small network, one objective for each of its outputs, and a method."""

    def __init__(self, name: str, engine: str, *around: gk.Transform, **options: Any) -> None:
        self.names = METHODS[name].names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, len(self.names))
            )
        self.method = made(name, len(self.names), 1)
        base = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.optimizer = gk.wrap(
            base, self.method, *around, model=self.model, engine=engine, **options
        )
        self.count = 0

    def objectives(self) -> dict[str, Callable[[], Tensor]]:
        x = torch.randn(8, 3, generator=seeded(self.count))

        def objective(k: int) -> Callable[[], Tensor]:
            target = (x * torch.tensor([1.0, -1.0, 0.5]).roll(k)).sum(1)
            return lambda: (self.model(x)[:, k] - target).square().mean()

        return {name: objective(k) for k, name in enumerate(self.names)}

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.step(self.objectives())
            self.count += 1

    def saved(self) -> dict[str, Any]:
        """Everything there is, by way of a file."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def bits(self) -> Any:
        state = self.saved()
        generator = self.method.generator
        return gk.testing.bits([state, generator and generator.get_state()])


@pytest.mark.parametrize(("name", "engine"), CONTRACT.items())
def test_it_keeps_the_optimizer_contract(name: str, engine: str) -> None:
    entry = METHODS[name]
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            made(name, len(entry.names)),
            model=model,
            engine=engine,
        ),
        entry.names,
    )


@every_engine
@every_method
def test_a_training_goes_on_from_a_file_as_if_nothing_had_been(name: str, engine: str) -> None:
    whole, first, second = (Run(name, engine) for _ in range(3))
    whole.steps(4)
    first.steps(2)
    model, optimizer = first.saved()
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    assert second.bits() == first.bits()
    second.count = 2
    second.steps(2)
    assert second.bits() == whole.bits()


@pytest.mark.parametrize(("name", "engine"), FAILURE.items())
def test_a_failed_step_leaves_no_trace(name: str, engine: str) -> None:
    """The last objective raises, or is not a number; then all goes on as it would have."""
    run, twin = Run(name, engine, nonfinite="skip"), Run(name, engine)
    run.steps(2)
    twin.steps(2)
    before = run.bits()
    buffers = [buffer.clone() for buffer in run.model.buffers()]

    def failing() -> Tensor:
        raise KeyError("no data")

    for last in (failing, lambda: run.model(torch.full((8, 3), torch.nan)).sum()):
        objectives = {**run.objectives(), run.names[-1]: last}
        try:
            run.optimizer.step(objectives)
        except KeyError:
            assert last is failing
        else:
            assert last is not failing
            assert not run.optimizer.last_step.applied
        assert run.bits() == before
    assert all(torch.equal(*pair) for pair in zip(run.model.buffers(), buffers, strict=True))
    run.steps(2)
    twin.steps(2)
    assert run.bits() == twin.bits()


@every_method
def test_sam_may_be_put_around_it(name: str) -> None:
    """With a radius of 0 it changes nothing."""
    plain, still, moved = (
        Run(name, "inplace", *around) for around in ((), (gk.SAM(rho=0.0),), (gk.SAM(rho=0.05),))
    )
    for run in (plain, still, moved):
        run.steps(2)
        assert run.optimizer.last_step.applied
        assert flat(run.model.parameters()).isfinite().all()
    weights = [flat(run.model.parameters()) for run in (plain, still, moved)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights[0], weights[2], rtol=1e-5, atol=1e-6)
