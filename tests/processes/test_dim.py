"""DiM with running histograms on two ranks, against one process with each rank's part by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradkit as gk
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
