"""Networks at a case: what a method is measured on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.transformer import VOCABULARY, Transformer
from examples.fundus.network import ResUNet34

RESUNET = "ResUNet-34"
TRANSFORMER = "transformer"
CLASSIFIER = "classifier of samples"


@dataclass(frozen=True)
class Problem:
    """A network, one batch for it, and losses.

    Attributes:
        network: Its name, with its width where that is not the usual one.
        case: Batch and size, as on the command line.
        x: The batch.
        classes: The dimension of the network's output that counts classes.
        build: Makes the network; `model` gives it its seed and device.
    """

    network: str
    case: str
    x: Tensor
    classes: int
    build: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        """A network, always with the same weights."""
        torch.manual_seed(0)
        return self.build().to(self.x.device)

    def pair(self, momentum: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A network and its base optimizer."""
        model = self.model()
        return model, torch.optim.SGD(model.parameters(), lr=1e-6, momentum=momentum)

    def parameters(self) -> int:
        """P, the number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.model().parameters())

    def loss(self, model: nn.Module) -> Tensor:
        """One loss."""
        output: Tensor = model(self.x)
        return output.square().mean()

    def losses(self, model: nn.Module, count: int) -> list[Tensor]:
        """Losses of one forward pass: they pull the same logits different ways."""
        output: Tensor = model(self.x)
        return [
            (output.select(self.classes, k % 2) - (k - count / 2)).square().mean()
            for k in range(count)
        ]


class PerSample(Problem):
    """A classifier with as many objectives as there are samples in the batch."""

    def loss(self, model: nn.Module) -> Tensor:
        """The mean of the samples' losses."""
        return torch.stack(self.losses(model, len(self.x))).mean()

    def losses(self, model: nn.Module, count: int) -> list[Tensor]:
        """Each sample's cross-entropy; there must be as many as objectives."""
        output: Tensor = model(self.x)
        labels = torch.arange(count, device=self.x.device) % output.shape[self.classes]
        return list(F.cross_entropy(output, labels, reduction="none"))


def classifier(samples: int, width: int, device: torch.device) -> PerSample:
    """Three layers of `width` units on samples of 256 numbers, and 10 classes."""
    x = torch.randn(samples, 256, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        inside = [(nn.Linear(width, width), nn.ReLU()) for _ in range(2)]
        layers = (layer for pair in inside for layer in pair)
        return nn.Sequential(nn.Linear(256, width), nn.ReLU(), *layers, nn.Linear(width, 10))

    name = f"{CLASSIFIER}, 3 layers of {width}"
    return PerSample(name, f"{samples}x256", x.to(device), 1, build)


def resunet(case: str, width: int, device: torch.device) -> Problem:
    """ResUNet-34 on BATCHxSIDE images."""
    batch, side = parse_case(case)
    image = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    name = RESUNET if width == 64 else f"{RESUNET}, width {width}"
    return Problem(name, case, image.to(device), 1, lambda: ResUNet34(width=width))


def transformer(case: str, width: int, layers: int, device: torch.device) -> Problem:
    """The transformer on BATCHxLENGTH tokens."""
    batch, length = parse_case(case)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    name = TRANSFORMER
    if (width, layers) != (512, 12):
        name = f"{name}, width {width}, {layers} layers"

    def build() -> nn.Module:
        return Transformer(width, layers, length=length)

    return Problem(name, case, tokens.to(device), 2, build)


def wide_mlp(width: int, device: torch.device) -> Problem:
    """Four square layers on two rows: many parameters, next to no activations."""
    x = torch.rand(2, width, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))

    return Problem(f"4 layers of {width}²", "2 rows", x.to(device), 1, build)


def parse_case(case: str) -> tuple[int, int]:
    """Batch and size.

    Raises:
        ValueError: The text is not two positive whole numbers joined by an x.

    Example:
        >>> parse_case("4x128")
        (4, 128)
    """
    batch, cross, size = case.partition("x")
    if not (cross and batch.isdecimal() and size.isdecimal() and int(batch) and int(size)):
        raise ValueError(f"the case {case!r} is not BATCHxSIZE, such as 4x128")
    return int(batch), int(size)
