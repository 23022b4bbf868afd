"""DiM on two ranks, against one process that takes each rank's part by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from divergence.problem import by_hand, domains, gap, task
from helpers import Perceptron, explicit, flat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradkit as gk
from gradkit.divergence import DivergenceAscent, DivergenceWeight
from processes.ranks import on_ranks

pytestmark = pytest.mark.distributed

STEPS = 4


class Network(nn.Module):
    """A segmentation network of one layer, with a histogram for each rank that it stands for."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 4)
        made = [gk.divergence.HistogramDivergence(4, decay=0.6) for _ in range(ranks)]
        self.divergences = nn.ModuleList(made)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(STEPS, 2, 8, 3, generator=generator, dtype=torch.float64)
    return [(source, 2 * target + 1) for source, target in pairs]


def train(ranks: int, perturb_on: str) -> dict[str, Tensor]:
    """Train on the parts of `ranks` ranks: one here, or all of them where there is one process."""
    here = [dist.get_rank()] if dist.is_initialized() else range(ranks)
    model = Network(len(here))
    net: nn.Module = model
    if dist.is_initialized():
        # Each rank keeps its own histograms.
        net = DistributedDataParallel(model, broadcast_buffers=False)
    base = torch.optim.SGD(model.net.parameters(), lr=0.5, momentum=0.9)
    optimizer = gk.DiM(base, net, rho=0.3, perturb_on=perturb_on, divergence_weight=3.0, ramp=3)
    reported = []
    for source, target in batches():
        parts = [(source.chunk(ranks)[k], target.chunk(ranks)[k]) for k in here]

        def losses(parts: list[tuple[Tensor, Tensor]] = parts) -> dict[str, Tensor]:
            outputs = [(net(x), net(other)) for x, other in parts]
            gaps = [f(*each) for f, each in zip(model.divergences, outputs, strict=True)]
            fits = [
                (out - x.sum(1, keepdim=True)).square().mean()
                for (out, _), (x, _) in zip(outputs, parts, strict=True)
            ]
            return {
                "task": torch.stack(fits).mean(),
                "divergence": torch.stack(gaps).mean(),
            }

        optimizer.step(losses)
        reported.append(optimizer.last_step.losses)
    return {
        "weights": torch.cat([w.detach().flatten() for w in model.net.parameters()]),
        "reported": torch.cat(reported),
        "histograms": torch.stack([f.log_histograms for f in model.divergences]),
    }


@pytest.mark.parametrize("perturb_on", ["total", "divergence"])
def test_ranks_train_as_one_process_would(perturb_on: str) -> None:
    ranks = on_ranks(2, train, 2, perturb_on)
    expected = train(2, perturb_on)
    for k, found in enumerate(ranks):
        assert torch.equal(found["weights"], ranks[0]["weights"])
        for what in ("weights", "reported"):
            torch.testing.assert_close(found[what], expected[what], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["histograms"][0], expected["histograms"][k])
    assert not torch.equal(*expected["histograms"])


CHOICES = [
    (perturb_on, apply_at)
    for perturb_on in ("total", "task", "divergence")
    for apply_at in ("perturbed", "clean")
]
PER_RANK = [(*choice, synchronised) for choice in CHOICES for synchronised in (0, 1)]


def trained_by_every_choice() -> dict[str, Tensor]:
    """The weights after some steps, where each rank has batches of its own."""
    found = {}
    for perturb_on, apply_at, synchronised in PER_RANK:
        model = Perceptron()
        ascent = DivergenceAscent(
            0.3, perturb_on=perturb_on, apply_at=apply_at, sync_perturbation=bool(synchronised)
        )
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = gk.wrap(
            base, DivergenceWeight(2.0), ascent, model=model, process_group=dist.group.WORLD
        )
        for batch in domains(STEPS, seed=1 + dist.get_rank()):

            def losses(model: nn.Module = model, batch: tuple[Tensor, ...] = batch) -> Any:
                weights = [*model.parameters()]
                return {"task": task(batch, *weights), "divergence": gap(batch, *weights)}

            optimizer.step(losses)
        found[f"{perturb_on} {apply_at} {synchronised}"] = flat(model.parameters())
    return found


def test_each_rank_may_ascend_along_its_own_gradients() -> None:
    """Each rank's whole step by hand; the ranks' directions are averaged."""
    first, second = on_ranks(2, trained_by_every_choice)
    for perturb_on, apply_at in CHOICES:
        weights = explicit(Perceptron())
        for batches in zip(domains(STEPS, seed=1), domains(STEPS, seed=2), strict=True):
            directions = [
                by_hand(batch, weights, 0.3, 2.0, perturb_on, apply_at) for batch in batches
            ]
            with torch.no_grad():
                for w, one, other in zip(weights, *directions, strict=True):
                    w.sub_(0.1 * (one + other) / 2)
        own, together = (first[f"{perturb_on} {apply_at} {s}"] for s in (0, 1))
        torch.testing.assert_close(own, flat(weights), rtol=1e-10, atol=1e-12)
        # One ascent for all ranks leads elsewhere.
        assert (together - own).norm() > 1e-4 * own.norm()
    for name, weights in first.items():
        assert torch.equal(weights, second[name])
