"""The networks: shapes, what the parts compute, and memory saved without another result."""

import pytest
import torch
from monai.networks.nets import DynUNet

from examples.aneurysm.networks import UNet3D, build_network

WIDTHS = {"unet": 2, "swin": 6}


def network(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_network(name, WIDTHS[name], **options)


def patches(side=16, seed=1):
    return torch.randn(2, 1, *3 * [side], generator=torch.Generator().manual_seed(seed))


def test_shapes_of_the_u_net():
    output = network("unet", deep_supervision=True)(patches())
    assert output.logits.shape == (2, 3, 16, 16, 16)
    assert output.latent.shape == (2, 16, 2, 2, 2)
    assert output.features.shape == (2, 2, 16, 16, 16)
    assert [each.shape[2] for each in output.auxiliary] == [8, 4]


def test_shapes_of_the_swin_network():
    """As published: 48 channels at a quarter of the side, for a width of 24."""
    output = network("swin", deep_supervision=True)(patches())
    assert output.logits.shape == (2, 3, 16, 16, 16)
    assert output.latent.shape == (2, 12, 4, 4, 4)
    assert output.features.shape == (2, 6, 16, 16, 16)
    assert [each.shape[2] for each in output.auxiliary] == [8]


def test_the_swin_network_of_the_authors_width():
    with torch.no_grad():
        latent = build_network("swin", 24)(torch.zeros(1, 1, 32, 32, 32)).latent
    assert latent.shape == (1, 48, 8, 8, 8)


def test_windows_of_the_swin_network_are_shifted_and_masked():
    """The first block mixes within windows of 7; the second is shifted by 3, not round the edge."""
    model = network("swin").eval()
    x = torch.randn(1, 14, 14, 14, 6, requires_grad=True)
    out = model._stage(0, x)
    for voxel, reached in ((2, range(7)), (5, range(14))):
        (gradient,) = torch.autograd.grad(
            out[0, voxel, voxel, voxel].square().sum(), x, retain_graph=True
        )
        # The mask of attention is −100, of which the softmax leaves e^−100.
        moved = (gradient[0].abs().sum((1, 2, 3)) > 1e-12).nonzero().flatten().tolist()
        assert moved == list(reached)


def test_the_u_net_is_monais():
    """With the weights of a DynUNet it computes what DynUNet does."""
    torch.manual_seed(0)
    theirs = DynUNet(3, 1, 3, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[2, 4, 8, 16]).eval()
    mine = UNet3D(2).eval()
    pairs = [
        *zip(
            mine.encoder, [theirs.input_block, *theirs.downsamples, theirs.bottleneck], strict=True
        ),
        *zip(mine.decoder, theirs.upsamples, strict=True),
        (mine.head, theirs.output_block),
    ]
    for own, other in pairs:
        own.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(mine(patches()).logits, theirs(patches()))


@pytest.mark.parametrize("name", ["unet", "swin"])
def test_checkpointing_changes_no_gradient(name):
    """Also where the graph is kept for a second backward pass, as for two objectives."""
    gradients = []
    for checkpointing in (False, True):
        model = network(name, checkpointing=checkpointing)
        output = model(patches())
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses = (output.latent.square().mean(), output.logits.square().mean())
        gradients += [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses
        ]
    half = len(gradients) // 2
    for plain, again in zip(gradients[:half], gradients[half:], strict=True):
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other)
