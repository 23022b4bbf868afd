"""The networks: a two-stage Swin U-Net, and a small 3D U-Net for CPUs. Both expose their latent."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch.nn.functional as F
from jaxtyping import Float
from monai.networks.blocks import PatchEmbed, UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets import DynUNet
from monai.networks.nets.swin_unetr import (
    PatchMergingV2,
    SwinTransformerBlock,
    compute_mask,
    get_window_size,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 3  # background, vessel, aneurysm
NetworkName = Literal["unet", "swin"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
STRIDE = 8
"""Sides of patches are multiples of it."""

UNET_LEVELS = 4
SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW = (2, 2), (3, 6), (7, 7, 7)


class Output(NamedTuple):
    """What a network makes of a batch of patches.

    Attributes:
        logits: Of background, vessel and aneurysm.
        latent: The encoder's last feature map.
        features: The decoder's last feature map, at full resolution.
        auxiliary: Logits of coarser decoder stages, from fine to coarse; for deep supervision.
    """

    logits: Float[Tensor, "n 3 d h w"]
    latent: Float[Tensor, "n c d2 h2 w2"]
    features: Float[Tensor, "n f d h w"]
    auxiliary: tuple[Tensor, ...] = ()


class UNet3D(nn.Module):
    """MONAI's DynUNet, the network of nnU-Net, of four levels.

    Args:
        width: Channels of the first level; each further one has twice as many.
        checkpointing: Compute activations again in the backward pass instead of keeping them.
        deep_supervision: Whether coarser decoder stages have logits, too.
    """

    def __init__(
        self, width: int = 8, checkpointing: bool = False, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        strides = [1] + [2] * (UNET_LEVELS - 1)
        filters = [width * 2**level for level in range(UNET_LEVELS)]
        parts = DynUNet(3, 1, CLASSES, [3] * UNET_LEVELS, strides, strides[1:], filters=filters)
        # DynUNet's own recursion hides the bottleneck; its parts are used in the same order.
        self.encoder = nn.ModuleList([parts.input_block, *parts.downsamples, parts.bottleneck])
        self.decoder = parts.upsamples
        self.head = parts.output_block
        self.auxiliary_heads = _heads(filters[-2:0:-1] if deep_supervision else [])
        self.checkpointing = checkpointing

    def forward(self, image: Float[Tensor, "n 1 d h w"]) -> Output:
        """Segments patches whose sides are multiples of 8, at least 16."""
        skips = []
        x = image
        for block in self.encoder:
            x = self._run(block, x)
            skips.append(x)
        latent = skips.pop()
        coarse = []
        for block in self.decoder:
            x = self._run(block, x, skips.pop())
            coarse.append(x)
        auxiliary = _auxiliary(self.auxiliary_heads, coarse[:-1])
        return Output(self.head(x), latent, x, auxiliary)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]


class SwinUNet3D(nn.Module):
    """A Swin U-Net of two stages, made of the parts of MONAI's SwinUNETR.

    As in the authors' code (Hatamizadeh et al., https://arxiv.org/abs/2201.01266, cut to two
    stages): patches of 2³ voxels, stages of two blocks with 3 and 6 heads, windows of 7³. With 24
    channels a volume of 128³ has a latent of 48×32³. MONAI's class has four stages fixed, hence the
    assembly here.

    Args:
        width: Channels of the first stage, a multiple of 3.
        checkpointing: Compute activations of the Swin blocks again in the backward pass.
        deep_supervision: Whether the coarser decoder stage has logits, too.
    """

    def __init__(
        self, width: int = 24, checkpointing: bool = False, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        norm = ("instance", {"affine": True})

        def block(inside: int, outside: int) -> UnetrBasicBlock:
            return UnetrBasicBlock(3, inside, outside, 3, 1, norm, res_block=True)

        self.embedding = PatchEmbed(2, 1, width)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                SwinTransformerBlock(
                    width * 2**stage,
                    SWIN_HEADS[stage],
                    SWIN_WINDOW,
                    shift_size=[(side // 2) * (k % 2) for side in SWIN_WINDOW],
                    use_checkpoint=checkpointing,
                )
                for k in range(depth)
            )
            for stage, depth in enumerate(SWIN_DEPTHS)
        )
        self.merging = PatchMergingV2(width)
        self.skip_full, self.skip_half = block(1, width), block(width, width)
        self.bottleneck = block(2 * width, 2 * width)
        self.up_half = UnetrUpBlock(3, 2 * width, width, 3, 2, norm, res_block=True)
        self.up_full = UnetrUpBlock(3, width, width, 3, 2, norm, res_block=True)
        self.head = UnetOutBlock(3, width, CLASSES)
        self.auxiliary_heads = _heads([width] if deep_supervision else [])

    def forward(self, image: Float[Tensor, "n 1 d h w"]) -> Output:
        """Segments patches whose sides are multiples of 4, at least 8."""
        embedded = self.embedding(image).movedim(1, -1)
        first = self._stage(0, embedded)
        latent = _normalised(self._stage(1, self.merging(first)))
        half = self.up_half(self.bottleneck(latent), self.skip_half(_normalised(first)))
        features = self.up_full(half, self.skip_full(image))
        auxiliary = _auxiliary(self.auxiliary_heads, [half])
        return Output(self.head(features), latent, features, auxiliary)

    def _stage(self, stage: int, x: Float[Tensor, "n d h w c"]) -> Float[Tensor, "n d h w c"]:
        space = tuple(x.shape[1:4])
        shifts = [side // 2 for side in SWIN_WINDOW]
        window, shift = get_window_size(space, SWIN_WINDOW, shifts)
        padded = [-(-n // w) * w for n, w in zip(space, window, strict=True)]
        # Where a volume is a single window nothing is shifted, and the mask is not used.
        mask = compute_mask(padded, window, shift, x.device) if any(shift) else None
        for block in self.stages[stage]:  # type: ignore[attr-defined]  # a ModuleList
            x = block(x, mask)
        return x


def build_network(
    name: NetworkName, width: int, checkpointing: bool = False, deep_supervision: bool = False
) -> nn.Module:
    """One of `NETWORKS`; see the classes for the arguments.

    Example:
        >>> import torch
    >>> network = build_network("unet", width=4)
        >>> output = network(torch.zeros(1, 1, 16, 16, 16))
        >>> output.logits.shape, output.latent.shape
        (torch.Size([1, 3, 16, 16, 16]), torch.Size([1, 32, 2, 2, 2]))
    """
    kind = {"unet": UNet3D, "swin": SwinUNet3D}[name]
    return kind(width, checkpointing, deep_supervision)


def _normalised(x: Float[Tensor, "n d h w c"]) -> Float[Tensor, "n c d h w"]:
    """Layer normalisation without weights, as SwinUNETR's, and channels first."""
    return F.layer_norm(x, x.shape[-1:]).movedim(-1, 1).contiguous()


def _heads(channels: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(UnetOutBlock(3, count, CLASSES) for count in channels)


def _auxiliary(heads: nn.ModuleList, coarse: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits of the decoder stages that have a head, from fine to coarse."""
    if not heads:
        return ()
    logits: list[Any] = [head(x) for head, x in zip(heads, coarse, strict=True)]
    return tuple(reversed(logits))
