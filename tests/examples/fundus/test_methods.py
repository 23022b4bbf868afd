"""Every method of `compare`: what it reads, needs and says of itself."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.common.adaptation import adapt_online
from examples.common.datasets import Sample
from examples.common.metrics import dice_of
from examples.fundus import comparison
from examples.fundus.gate import CupRatio
from examples.fundus.methods import BY_DEFAULT, METHODS, build_adapter
from gradkit import tta

CPU = torch.device("cpu")
DICE = dice_of(("large", "small"))
RATIO = CupRatio(0.3, 0.1)


class Network(nn.Sequential):
    """Has a denoising head, as methods that adapt by one need."""

    def auxiliary(self, images, head):
        assert head == "denoising"
        return images + self(images).mean(dim=1, keepdim=True)


def network():
    """Three channels in, two structures out; what PASS prompts has ResUNet-34's name."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
    res = nn.Sequential(OrderedDict(conv1=first, layer4=nn.ReLU()))
    return Network(OrderedDict(res=res, norm=nn.BatchNorm2d(4), last=last)).eval()


@pytest.mark.parametrize("name", METHODS)
def test_no_label_is_read_and_the_source_model_stays(name):
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    streams = []
    for target in (torch.zeros(2, 32, 32), torch.ones(2, 32, 32)):
        samples = [Sample(f"{i}.png", image, target) for i, image in enumerate(images)]
        adapter = build_adapter(name, model, lr=0.01, ratio=RATIO)
        first = METHODS[name].target_first
        streams.append(adapt_online(adapter, samples, CPU, DICE, range(3), target_first=first))
    for index in range(3):
        assert torch.equal(*[stream.predictions[index] for stream in streams])
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_what_is_chosen_reaches_those_that_leave_it_open():
    learning = [name for name, method in METHODS.items() if method.learns]
    assert learning == ["tent", "grata"]
    model = network()
    for name, method in METHODS.items():
        made = [build_adapter(name, model, "mixed:0.8", lr, ratio=RATIO) for lr in (0.5, 0.25)]
        if method.learns:
            assert [each.optimizer.param_groups[0]["lr"] for each in made] == [0.5, 0.25]
            assert made[0].statistics == tta.Mixed(0.8)
        elif made[0].optimizer is not None:
            assert len({each.optimizer.param_groups[0]["lr"] for each in made} - {0.5, 0.25}) == 1


def test_detta_as_released_sees_batches_of_eight_with_running_statistics():
    adapter, online = (build_adapter(name, network()) for name in ("detta-released", "detta"))
    assert METHODS["detta-released"].target_first == 8
    assert adapter.optimizer.param_groups[0]["lr"] == 1e-6
    assert adapter.optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    before = adapter.model[1].running_mean.clone()
    adapter.adapt(torch.rand(8, 3, 32, 32))
    assert not torch.equal(adapter.model[1].running_mean, before)
    assert online.optimizer.param_groups[0]["lr"] == 1e-4
    assert all(each.objectives["loss"].noise == "gaussian" for each in (adapter, online))


def test_the_command_lists_all_methods_and_starts_with_the_default_ones():
    text = Path(comparison.__file__).read_text()
    told = text.partition("Methods, separated by commas:")[2].partition('"""')[0]
    words = {word.strip(",.;:()") for word in told.split()}
    assert set(METHODS) <= words
    assert comparison.Compare.methods == ",".join(BY_DEFAULT)
    with pytest.raises(ValueError, match="there is no method 'tents'; choose one of none, ptbn"):
        build_adapter("tents", network())


def test_a_method_that_needs_a_head_says_so():
    model = nn.Sequential(*network())
    with pytest.raises(ValueError, match="auxiliary head, which Sequential lacks: give"):
        build_adapter("detta", model)


def test_heads_take_no_part_in_other_methods():
    class Headed(Network):
        auxiliary_heads = True

        def without_heads(self):
            return network()

    images = torch.rand(2, 1, 3, 32, 32)
    for method in ("tent", "diga", "dltta"):  # diga and dltta look for the last layer
        headed = Headed(*network(), nn.Identity(), nn.Conv2d(2, 2, 1))
        adapted = build_adapter(method, headed, lr=0.01), build_adapter(method, network(), lr=0.01)
        for image in images:
            assert torch.equal(*[adapter(image) for adapter in adapted])
