"""DUA beside an independent reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkit as gk
from tta.references import images, network, reference_forward, reference_moments, running
from tta.references import source_weights as weights_of


def test_dua_equals_an_independent_reference() -> None:
    model = network()
    adapter, weights, statistics = gk.tta.DUA(model), weights_of(model), running(model)
    source = running(model)
    for k, x in enumerate(images(3), start=1):
        views = torch.cat([x, x.flip(-1), x.flip(-2), x.flip(-1, -2)])  # 12 by 16: no quarter turns
        seen = {}

        def learning(x, layer):
            seen[layer] = reference_moments(x, layer), x.numel() / x.shape[1]
            return seen[layer][0]

        reference_forward(weights, views, learning)
        m = 0.1 * 0.94**k + 0.005
        for layer, ((mean, var), count) in seen.items():
            statistics[layer] = (
                (1 - m) * statistics[layer][0] + m * mean,
                (1 - m) * statistics[layer][1] + m * var * count / (count - 1),
            )
        expected = reference_forward(weights, x, lambda x, layer: statistics[layer])
        torch.testing.assert_close(adapter(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(statistics["1"][0], source["1"][0])


def test_the_momenta_are_the_papers() -> None:
    statistics = gk.tta.DynamicStatistics()
    momenta = [statistics.momentum_of(k) for k in (1, 2, 3)]
    assert momenta == pytest.approx([0.099, 0.09336, 0.0880584])
    assert statistics.momentum_of(1000) == pytest.approx(0.005)


def test_square_images_are_seen_in_six_views() -> None:
    adapter, sizes = gk.tta.DUA(network()), []
    adapter.model[0].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    adapter(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    assert sizes == [6, 1]


def test_statistics_that_learn_do_so_once_beside_an_objective() -> None:
    """However often a step evaluates the model, and what it evaluates it on."""
    statistics = gk.tta.DynamicStatistics()
    adapter = gk.tta.GraTa(network(), lr=0.0, statistics=statistics)
    alone = gk.tta.DUA(network())
    for x in images(3):
        torch.testing.assert_close(adapter(x), alone(x))
    assert (adapter.statistics.k, statistics.k) == (3, 0)


def test_layers_that_are_called_twice_learn_from_the_mean() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(3 * self.norm(x) + 7)

    x = torch.tensor([[0.0], [2.0]])
    adapter = gk.tta.DUA(
        Twice().eval(), momentum=1.0, decay=1.0, least=0.0, views=gk.tta.WEAK_VIEWS[:1]
    )
    adapter(x)
    # moments of x are 1 and 2 (unbiased), those of ±3 + 7 are 7 and 18
    assert adapter.model.norm.running_mean.item() == pytest.approx(4.0, abs=1e-4)
    assert adapter.model.norm.running_var.item() == pytest.approx(10.0, abs=1e-3)


def test_a_failing_pass_teaches_nothing() -> None:
    adapter = gk.tta.DUA(network())
    adapter(images(1)[0])
    before = gk.testing.bits(adapter.state_dict())
    with pytest.raises(ValueError, match="at least 2 values a channel"):
        gk.tta.DUA(nn.BatchNorm1d(2), views=gk.tta.WEAK_VIEWS[:1])(torch.rand(1, 2))
    handle = adapter.model[7].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(images(2)[1])
    handle.remove()
    assert gk.testing.bits(adapter.state_dict()) == before
    twin = gk.tta.DUA(network())
    twin(images(1)[0])
    assert torch.equal(adapter(images(2)[1]), twin(images(2)[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.2}, "momentum is 1.2"),
        ({"decay": -1}, "decay is -1"),
        ({"momentum": 1.0}, r"momentum \+ least is 1.005"),
        ({"views": ()}, "views is empty"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.tta.DUA(network(), **arguments)
    with pytest.raises(ValueError, match="no running statistics"):
        gk.tta.DUA(nn.BatchNorm2d(2, track_running_stats=False))
