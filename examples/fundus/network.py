"""ResUNet-34: the segmentation network of GraTa's experiments, with its released parameter names.

A ResNet-34 encoder and a light decoder of transposed convolutions, from Chen et al., "Gradient
Alignment Improves Test-Time Adaptation for Medical Image Segmentation", AAAI 2025,
https://arxiv.org/abs/2408.07343. The encoder is He et al., https://arxiv.org/abs/1512.03385, in
the layout of torchvision's `resnet34`, written out here because MONAI's ResNet-34 pads shortcuts
through `.data`, which cuts their gradient.

The encoder has no `fc`: the 22.04 M parameters of the released network leave no room for the
0.51 M of an ImageNet classifier. To start from ImageNet weights, drop their `fc.weight` and
`fc.bias` and load the rest into `ResUNet34().res`.
"""

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ENCODER_STRIDE = 32
HEADS = ("reconstruction", "denoising", "rotation", "super_resolution")
FeatureMaps: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
NUM_ROTATIONS = 6  # horizontal flip, vertical flip, 90, 180, 270 degrees, identity


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., Fig. 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d k l"]:
        """The block's output, at 1/stride of the resolution."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Encoder(nn.Module):
    """ResNet-34 without its classifier; returns the five feature maps that the decoder reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(3, width, width, stride=1)
        self.layer2 = self._stage(4, width, 2 * width, stride=2)
        self.layer3 = self._stage(6, 2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(3, 4 * width, 8 * width, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, image: Float[Tensor, "n 3 h w"]) -> FeatureMaps:
        """The maps s0 … s4, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution."""
        s0 = F.relu(self.bn1(self.conv1(image)))
        s1 = self.layer1(F.max_pool2d(s0, 3, stride=2, padding=1))
        s2 = self.layer2(s1)
        s3 = self.layer3(s2)
        return s0, s1, s2, s3, self.layer4(s3)


class DecoderBlock(nn.Module):
    """Doubles the resolution and appends a skip: ReLU comes before batch normalisation here."""

    def __init__(self, up_channels: int, skip_channels: int, channels: int) -> None:
        super().__init__()
        self.x_conv = nn.Conv2d(skip_channels, channels // 2, 1)
        self.tr_conv = nn.ConvTranspose2d(up_channels, channels // 2, 2, stride=2)
        self.bn = nn.BatchNorm2d(channels)

    def forward(
        self, x: Float[Tensor, "n c h w"], skip: Float[Tensor, "n d 2*h 2*w"]
    ) -> Float[Tensor, "n e 2*h 2*w"]:
        """The joined maps, at the resolution of the skip."""
        joined = torch.cat([self.tr_conv(x), self.x_conv(skip)], dim=1)
        out: Tensor = self.bn(F.relu(joined))
        return out


class UpsamplingBlock(nn.Module):
    """Bilinear ×2, 1×1 convolution, ReLU, batch normalisation: one step of an auxiliary head."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d 2*h 2*w"]:
        """The map at twice the resolution."""
        out: Tensor = self.bn(F.relu(self.conv(_double(x))))
        return out


def _double(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 2*h 2*w"]:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Segmentation(NamedTuple):
    """What one pass of the segmentation network yields, for an image of `h` × `w` pixels.

    Attributes:
        logits: [n, num_classes, h, w]; channel 0 is the whole disc, channel 1 the cup.
        bottleneck: [n, 8·width, h/32, w/32], the encoder's deepest map (s4).
        features: [n, width/2, h, w], what the 1×1 classifier reads.
    """

    logits: Tensor
    bottleneck: Tensor
    features: Tensor


class ResUNet34(nn.Module):
    """Optic disc and cup segmentation by a ResNet-34 with a U-shaped decoder.

    Args:
        width: channels of the first stage; 64 is the published network. Every other channel
            count is proportional to it, so that a smaller width is a narrow variant of the same
            network.
        auxiliary_heads: also build the heads for reconstruction, denoising, rotation and
            super-resolution that GraTa's Table 5 compares.
        num_classes: output channels.

    Raises:
        ValueError: `width` is not a positive even number or `num_classes` is less than 1.
    """

    def __init__(
        self, width: int = 64, auxiliary_heads: bool = False, num_classes: int = 2
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}; choose a positive even number (64 is the paper's)")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; choose at least 1")
        self.width, self.auxiliary_heads, self.num_classes = width, auxiliary_heads, num_classes
        self.res = Encoder(width)
        self.up1 = DecoderBlock(8 * width, 4 * width, 4 * width)
        self.up2 = DecoderBlock(4 * width, 2 * width, 4 * width)
        self.up3 = DecoderBlock(4 * width, width, 4 * width)
        self.up4 = DecoderBlock(4 * width, width, 4 * width)
        self.up5 = nn.ConvTranspose2d(4 * width, width // 2, 2, stride=2)
        self.bnout = nn.BatchNorm2d(width // 2)
        self.seg_head = nn.Conv2d(width // 2, num_classes, 1)
        if auxiliary_heads:
            self._build_heads(width)

    def _build_heads(self, width: int) -> None:
        channels = (8 * width, 4 * width, 2 * width, width, width // 2)
        for trunk in ("recon", "denoise", "supres"):
            for step in range(4):
                block = UpsamplingBlock(channels[step], channels[step + 1])
                self.add_module(f"{trunk}{step + 1}", block)
        narrow = channels[-1]
        self.recon_head = nn.Conv2d(narrow, 3, 1)
        self.denoise_head = nn.Conv2d(narrow, 3, 1)
        self.rotate_head = nn.Sequential(
            nn.Linear(8 * width, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Linear(4 * width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, NUM_ROTATIONS),
        )
        self.supres_head = nn.Sequential(
            nn.Conv2d(narrow, narrow, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(narrow, 3 * 2**2, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def without_heads(self) -> "ResUNet34":
        """The segmentation network alone, with the same tensors; itself if it has no heads."""
        if not self.auxiliary_heads:
            return self
        with torch.device("meta"):
            alone = ResUNet34(self.width, num_classes=self.num_classes)
        tensors = self.state_dict(keep_vars=True)
        alone.load_state_dict({name: tensors[name] for name in alone.state_dict()}, assign=True)
        return alone.train(self.training)

    def forward(self, image: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h w"]:
        """The segmentation logits of an image; see `segment`."""
        return self.segment(image).logits

    def segment(self, image: Float[Tensor, "n 3 h w"]) -> Segmentation:
        """The logits together with the feature maps that some adaptation methods read.

        Raises:
            ValueError: height or width of the image is not a multiple of 32.
        """
        s0, s1, s2, s3, s4 = self.encode(image)
        x = self.up4(self.up3(self.up2(self.up1(s4, s3), s2), s1), s0)
        features = F.relu(self.bnout(self.up5(x)))
        return Segmentation(self.seg_head(features), s4, features)

    def encode(self, image: Float[Tensor, "n 3 h w"]) -> FeatureMaps:
        """The encoder's maps s0 … s4, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.

        Raises:
            ValueError: height or width of the image is not a multiple of 32.
        """
        height, width = image.shape[-2:]
        if height % ENCODER_STRIDE or width % ENCODER_STRIDE:
            raise ValueError(
                f"the image is {height} by {width} pixels; resize it to multiples of "
                f"{ENCODER_STRIDE}"
            )
        maps: FeatureMaps = self.res(image)
        return maps

    def auxiliary(self, image: Float[Tensor, "n 3 h w"], head: str) -> Tensor:
        """The output of one auxiliary head, which reads the bottleneck and no skips.

        Args:
            image: for `super_resolution` the small image.
            head: one of `HEADS`.

        Returns:
            Logits of the restored image [n, 3, h, w] for `reconstruction` and `denoising`, of
            the enlarged image [n, 3, 2h, 2w] for `super_resolution`, of the six transformations
            [n, 6] for `rotation`.

        Raises:
            ValueError: there is no such head, or the network was built without them.
        """
        if head not in HEADS:
            raise ValueError(f"there is no head {head!r}; choose one of {', '.join(HEADS)}")
        if not self.auxiliary_heads:
            raise ValueError(
                f"this network has no {head} head; build it with ResUNet34(auxiliary_heads=True)"
            )
        x = self.encode(image)[-1]
        if head == "rotation":
            logits: Tensor = self.rotate_head(x.mean(dim=(2, 3)))
            return logits
        trunk = {"reconstruction": "recon", "denoising": "denoise", "super_resolution": "supres"}[
            head
        ]
        for step in range(1, 5):
            x = self.get_submodule(f"{trunk}{step}")(x)
        out: Tensor = self.get_submodule(f"{trunk}_head")(_double(x))
        return out
