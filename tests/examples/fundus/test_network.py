import pytest
import torch
from torch import nn

from examples.fundus.network import HEADS, DecoderBlock, ResUNet34


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("auxiliary_heads", "norms", "affine", "parameters"),
    [(False, 41, 19_136, 22_041_570), (True, 53, 22_016, 22_754_842)],
)
def test_size_of_the_published_network(auxiliary_heads, norms, affine, parameters):
    with torch.device("meta"):
        model = ResUNet34(auxiliary_heads=auxiliary_heads)
    found = batch_norms(model)
    assert len(found) == norms
    assert sum(norm.weight.numel() + norm.bias.numel() for norm in found) == affine
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def released_modules(auxiliary_heads):
    """Names of the modules with parameters in the released network, from its description."""
    names = {"res.conv1", "res.bn1", "up5", "bnout", "seg_head"}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            prefix = f"res.layer{stage}.{block}"
            names |= {f"{prefix}.{part}" for part in ("conv1", "bn1", "conv2", "bn2")}
        if stage > 1:
            names |= {f"res.layer{stage}.0.downsample.{part}" for part in (0, 1)}
    names |= {f"up{step}.{part}" for step in range(1, 5) for part in ("x_conv", "tr_conv", "bn")}
    if auxiliary_heads:
        for trunk in ("recon", "denoise", "supres"):
            names |= {f"{trunk}{step}.{part}" for step in range(1, 5) for part in ("conv", "bn")}
        names |= {"recon_head", "denoise_head"}
        names |= {f"{head}_head.{layer}" for head in ("rotate", "supres") for layer in (0, 2, 4)}
    return names


@pytest.mark.parametrize("auxiliary_heads", [False, True])
def test_state_dict_has_the_released_names(auxiliary_heads):
    with torch.device("meta"):
        state = ResUNet34(auxiliary_heads=auxiliary_heads).state_dict()
    assert {name.rpartition(".")[0] for name in state} == released_modules(auxiliary_heads)
    assert state["up1.tr_conv.weight"].shape == (512, 128, 2, 2)
    assert state["up3.x_conv.weight"].shape == (128, 64, 1, 1)
    assert state["res.layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert state["seg_head.weight"].shape == (2, 32, 1, 1)


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(0)
    return ResUNet34(width=4, auxiliary_heads=True).eval()


def test_one_pass_yields_logits_and_feature_maps(narrow):
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        segmentation = narrow.segment(image)
        maps = narrow.encode(image)
    assert segmentation.logits.shape == (2, 2, 64, 96)
    assert segmentation.bottleneck.shape == (2, 32, 2, 3)
    assert segmentation.features.shape == (2, 2, 64, 96)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (4, 32, 48), (4, 16, 24), (8, 8, 12), (16, 4, 6), (32, 2, 3),
    ]  # fmt: skip
    torch.testing.assert_close(narrow(image), segmentation.logits)
    torch.testing.assert_close(narrow.seg_head(segmentation.features), segmentation.logits)


def test_decoder_normalises_after_the_rectifier():
    torch.manual_seed(0)
    block, x, skip = DecoderBlock(8, 4, 6).eval(), torch.randn(3, 8, 2, 2), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        block.bn.running_mean.fill_(0.5)
        block.bn.bias.uniform_(-1, 1)
        joined = torch.cat([block.tr_conv(x), block.x_conv(skip)], dim=1)
        torch.testing.assert_close(block(x, skip), block.bn(joined.relu()))


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("reconstruction", (2, 3, 64, 64)),
        ("denoising", (2, 3, 64, 64)),
        ("super_resolution", (2, 3, 128, 128)),
        ("rotation", (2, 6)),
    ],
)
def test_auxiliary_heads_read_the_bottleneck_only(narrow, head, shape):
    image = torch.rand(2, 3, 64, 64)
    output = narrow.auxiliary(image, head)
    assert output.shape == shape
    narrow.zero_grad()
    output.square().sum().backward()
    reached = {name.split(".")[0] for name, p in narrow.named_parameters() if p.grad is not None}
    trunk = {"reconstruction": "recon", "denoising": "denoise", "rotation": "rotate"}
    assert all(name == "res" or name.startswith(trunk.get(head, "supres")) for name in reached), (
        reached
    )


def test_every_parameter_gets_a_gradient(narrow):
    image = torch.rand(2, 3, 64, 64)
    narrow.zero_grad()
    loss = narrow(image).square().mean()
    for head in HEADS:
        loss = loss + narrow.auxiliary(image, head).square().mean()
    loss.backward()
    silent = [name for name, p in narrow.named_parameters() if not (p.grad != 0).any()]
    assert silent == []


def test_input_is_left_alone(narrow):
    image = torch.rand(1, 3, 64, 64)
    before = image.clone()
    narrow(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("shape", [(1, 3, 64, 65), (1, 3, 50, 64)])
def test_sizes_that_do_not_halve_five_times_are_refused(narrow, shape):
    with pytest.raises(ValueError, match=r"resize it to multiples of 32"):
        narrow(torch.zeros(shape))


@pytest.mark.parametrize(("width", "num_classes"), [(0, 2), (7, 2), (-2, 2), (4, 0)])
def test_impossible_widths_are_refused(width, num_classes):
    with pytest.raises(ValueError, match="choose"):
        ResUNet34(width, num_classes=num_classes)


def test_unknown_and_missing_heads_are_refused(narrow):
    with pytest.raises(ValueError, match=r"no head 'jigsaw'; choose one of reconstruction"):
        narrow.auxiliary(torch.zeros(1, 3, 64, 64), "jigsaw")
    with pytest.raises(ValueError, match=r"auxiliary_heads=True"):
        ResUNet34(4).auxiliary(torch.zeros(1, 3, 64, 64), "rotation")
