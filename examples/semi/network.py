"""The U-Net of the semi-supervised examples, with its last decoder features exposed."""

from typing import NamedTuple

from jaxtyping import Float
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

STRIDE = 16
"""What the image's side must be a multiple of."""


class Segmentation(NamedTuple):
    """What a pass of the network yields.

    Attributes:
        logits: [n, structures, h, w].
        features: [n, width, h, w], what the 1×1 classifier reads.
    """

    logits: Tensor
    features: Tensor


class UNet(nn.Module):
    """MONAI's `BasicUNet` with batch normalisation and widths w, 2w, 4w, 8w, 16w.

    MiDSS's has the widths 64 to 1024. A structure has a logit of its own, whose sigmoid is its
    probability; for a single structure that is a softmax over it and the background.

    Args:
        channels: of the image, whose intensities lie in [0, 1] and are stretched to [−1, 1].
        structures: number of output channels.
        width: w; 64 is the published network.

    Raises:
        ValueError: the width is not positive.
    """

    def __init__(self, channels: int, structures: int, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; choose a positive number (64 is the paper's)")
        widths = [width * 2**level for level in range(5)]
        self.body = BasicUNet(
            spatial_dims=2,
            in_channels=channels,
            out_channels=1,
            features=(*widths, width),
            act=("relu", {"inplace": True}),
            norm="batch",
            bias=False,
        )
        self.body.final_conv = nn.Identity()  # what remains ends with the features
        self.head = nn.Conv2d(width, structures, 1)

    def forward(self, image: Float[Tensor, "n c h w"]) -> Float[Tensor, "n s h w"]:
        """The segmentation logits of an image."""
        return self.segment(image).logits

    def segment(self, image: Float[Tensor, "n c h w"]) -> Segmentation:
        """The logits together with the features that they are computed from."""
        features = self.body(2 * image - 1)
        return Segmentation(self.head(features), features)
