"""Training of the auxiliary heads, after that of the segmentation, at the same centre.

GraTa's Table 5 (Chen et al., https://arxiv.org/abs/2408.07343) adapts by heads for reconstruction,
denoising, rotation and super-resolution. How the authors trained theirs is not released; this is
our design. The source model is frozen, so that it segments with the same bits as without heads.
Each head alone is trained, by Adam, on the loss by which it adapts later, and with the statistics
with which it adapts later: by default those of each image by itself.

The rotation head sees all six transformations of an image in one step. Their features differ less
than those of two images, so that with one that is drawn, as in the adaptation, the head was still
near chance after as many steps.

The images are those of the source training, with its augmentation except for the mirroring: after
it, nobody could tell which way an image was turned. What a head can learn is limited by what the
segmentation keeps of an image, and rotation also by left and right eyes being mirror images.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import gradkit as gk
from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample, fingerprint, length, split_held_out
from examples.common.training import Entry, Training, polynomial_learning_rate
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.network import HEADS, ResUNet34
from examples.fundus.objectives import HEADS_OF, build_objective
from examples.fundus.source_model import Architecture, describe
from examples.fundus.training import Batch, start_or_resume
from gradkit.tta import ROTATION_VIEWS
from gradkit.tta.parts import tell
from gradkit.tta.statistics import AdaptedBatchNorm

MODULES = ("recon", "denoise", "rotate", "supres")
"""What the names of the heads' modules begin with."""

STATISTICS = ("test", "source")
"""Where the network takes the statistics of its normalisation while heads are trained."""


@dataclass(frozen=True)
class HeadSettings:
    """Hyper-parameters of a training of heads.

    Attributes:
        epochs: passes over the training images.
        seed: of weights, split, order, augmentation, noise and rotations.
        batch_size: images per step.
        learning_rate: Adam's, of the first epoch.
        statistics: one of `STATISTICS`, those of the adaptation that the heads are for; see
            `use_statistics`.
    """

    epochs: int = 20
    seed: int = 0
    batch_size: int = 4
    learning_rate: float = 1e-2
    statistics: str = "test"


def with_heads(source: ResUNet34, seed: int) -> ResUNet34:
    """A copy of a source model in evaluation mode, with new heads of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResUNet34(source.width, auxiliary_heads=True)
    model.load_state_dict({**model.state_dict(), **source.without_heads().state_dict()})
    return model.eval()


def heads_of(model: ResUNet34) -> nn.ModuleDict:
    """The modules of a network's heads, by their names in the network."""
    return nn.ModuleDict(
        {name: module for name, module in model.named_children() if name.startswith(MODULES)}
    )


@dataclass(frozen=True)
class EachImage(gk.tta.Statistics):
    """Mean and variance of each image of a batch by itself: `"test"`, where an image comes alone.

    Layers in training mode keep a running mean of them, for an adaptation that mixes statistics.
    """

    def normalise(
        self, layer: AdaptedBatchNorm, x: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """The layer's output.

        Raises:
            ValueError: a channel of an image has a single value, which has no variance.
        """
        kept = (layer.running_mean, layer.running_var) if layer.training else (None, None)
        return F.instance_norm(
            x, *kept, layer.weight, layer.bias, True, layer.momentum or 0.0, layer.eps
        )


def use_statistics(model: ResUNet34, statistics: str) -> ResUNet34:
    """Makes a network normalise as in the adaptation that its heads are for; returns it.

    Args:
        model: changed in place, but none of its tensors.
        statistics: `test` for those of each image by itself, `source` for the running ones.

    Raises:
        ValueError: they are neither.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics are {statistics!r}; choose one of {', '.join(STATISTICS)}")
    if statistics == "test":
        gk.tta.install_statistics(model, EachImage())
    return model


def transformed(
    image: Float[Tensor, "n 3 h w"],
) -> tuple[Float[Tensor, "m 3 h w"], Int[Tensor, " m"]]:
    """Images in all six transformations of the rotation task, m = 6n, and which one each is in."""
    turned = torch.cat([view.forward(image) for view in ROTATION_VIEWS])
    classes = torch.arange(len(ROTATION_VIEWS), device=image.device)
    return turned, classes.repeat_interleave(len(image))


def rotation_loss(model: ResUNet34, image: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """What `gradkit.tta.Rotation` is in the mean over the transformations that it may draw."""
    turned, classes = transformed(image)
    return F.cross_entropy(model.auxiliary(turned, "rotation"), classes)


@dataclass(frozen=True)
class Standardised:
    """The features that the rotation head reads, brought to mean 0 and standard deviation 1.

    Without it the head stays at chance for hundreds of steps: the features of an image differ much
    less from those of its turned copies than from 0. After the training it becomes part of the
    head's first layer, which then reads the features as they are.

    Attributes:
        mean: of each feature over six transformations of all training images.
        std: likewise.
    """

    mean: Float[Tensor, " features"]
    std: Float[Tensor, " features"]

    @classmethod
    def over(cls, samples: Dataset[Sample], model: ResUNet34) -> "Standardised":
        """Mean and deviation over samples, computed on the model's device."""
        device, features = model.seg_head.weight.device, []
        for index in range(length(samples)):
            image = samples[index].image.unsqueeze(0).to(device)
            with torch.no_grad():
                features.append(model.encode(transformed(image)[0])[-1].mean(dim=(2, 3)))
        seen = torch.cat(features)
        return cls(seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-3))

    def attach(self, model: ResUNet34) -> None:
        """Makes the rotation head of a network read standardised features."""
        model.get_submodule("rotate_head.0").register_forward_pre_hook(
            lambda _, inputs: ((inputs[0] - self.mean) / self.std,)
        )

    @torch.no_grad()
    def fold(self, model: ResUNet34) -> None:
        """Changes the first layer of a rotation head that was trained with it, to do without."""
        layer = model.get_submodule("rotate_head.0")
        assert isinstance(layer, nn.Linear)
        layer.weight /= self.std.to(layer.weight.device)
        layer.bias -= layer.weight @ self.mean.to(layer.weight.device)


def train_heads(
    samples: Dataset[Sample],
    source: ResUNet34,
    architecture: Architecture,
    settings: HeadSettings,
    directory: Path,
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[Entry], None] | None = None,
    on_resume: Callable[[], None] | None = None,
    root: str = "folder",
) -> tuple[ResUNet34, Entry]:
    """Trains heads for a source model; returns both as one network, and how good the heads are.

    The heads are those of the best epoch, by the mean of the scores of `evaluate_heads`. The
    network is on the CPU and in evaluation mode. Files in `directory` hold the heads only, by their
    names in the network, the rotation head for `Standardised` features. A training that was
    interrupted and resumed ends with the same bits as one that was not.

    Args:
        samples: the source's train list.
        source: the source model, which is not changed.
        architecture: of the source model.
        settings: hyper-parameters.
        directory: where the checkpoints go; made if missing.
        device: where to compute.
        resume: go on from `last.pt` if there is one; otherwise start anew.
        progress: show progress on standard error.
        on_epoch: called after each epoch's checkpoints are written.
        on_resume: called once an earlier training is restored, before it goes on.
        root: kind of data root that the samples are from, `synthetic` or `folder`.

    Raises:
        CheckpointError: `last.pt` is unreadable or belongs to another training.
        TrainingError: `last.pt` belongs to other data, or the loss is no longer finite.
        ValueError: there are fewer than two samples, or the statistics are none of `STATISTICS`.
    """
    architecture = replace(architecture, auxiliary_heads=True)
    training, standardised = make_training(samples, source, architecture, settings, device, root)
    description = f"train heads of {architecture.source}" if progress else None
    best = load(
        start_or_resume(training, architecture, directory, description, resume, on_epoch, on_resume)
    )
    model = with_heads(source, settings.seed)
    heads_of(model).load_state_dict(best["model"])
    standardised.fold(model)
    return model, best["history"][-1]


def make_training(
    samples: Dataset[Sample],
    source: ResUNet34,
    architecture: Architecture,
    settings: HeadSettings,
    device: torch.device,
    root: str,
) -> tuple[Training[Batch], Standardised]:
    """A training of heads before its first epoch; arguments are those of `train_heads`."""
    train_indices, held_out_indices = split_held_out(length(samples), settings.seed)
    augmented = AugmentedDataset(Subset(samples, train_indices), settings.seed, mirror=False)
    held_out = Subset(samples, held_out_indices)
    model = use_statistics(with_heads(source, settings.seed), settings.statistics).to(device)
    standardised = Standardised.over(Subset(samples, train_indices), model)
    standardised.attach(model)
    model.requires_grad_(False)
    heads = heads_of(model).requires_grad_(True)
    generator = torch.Generator().manual_seed(settings.seed)
    losses = {name: build_objective(name, generator) for name in HEADS_OF if name != "rot"}

    def objectives(batch: Batch) -> Callable[[], Tensor]:
        image = batch[0].to(device)
        tell(losses.values(), "begin_step", image)

        def loss() -> Tensor:  # the heads share no weight: each gets the gradient of its own loss
            terms = [objective(model, image) for objective in losses.values()]
            found = [term for term in terms if term is not None]
            return torch.stack([*found, rotation_loss(model, image)]).sum()

        return loss

    def batches(epoch: int) -> Iterable[Batch]:
        augmented.epoch = epoch
        order = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        return DataLoader(augmented, settings.batch_size, shuffle=True, generator=order)

    def validate() -> dict[str, float]:
        heads.eval()
        return evaluate_heads(model, held_out, device)

    training = Training(
        heads,
        gk.wrap(
            torch.optim.Adam(heads.parameters(), lr=settings.learning_rate),
            model=heads,
            nonfinite="ignore",
        ),
        objectives,
        batches,
        validate=validate,
        select=lambda entry: sum(entry[name] for name in HEADS),
        settings={**asdict(settings), "source_model": digest(source)},
        data=fingerprint(samples, root),
        details=describe(architecture),
        learning_rate=lambda epoch: polynomial_learning_rate(
            settings.learning_rate, epoch, settings.epochs
        ),
        generators={"heads": generator},
        count=lambda batch: len(batch[0]),
    )
    return training, standardised


def describe_heads(statistics: str) -> dict[str, Any]:
    """What a file of a network with heads tells of them, as `load_heads_statistics` reads it."""
    return {"heads": {"statistics": statistics}}


def load_heads_statistics(path: Path) -> str | None:
    """The statistics with which a file's heads were trained; None for files that do not tell.

    Raises:
        CheckpointError: the file is missing or unreadable, or they are none of `STATISTICS`.
    """
    content = load(path).get("heads")
    if content is None:
        return None
    for statistics in STATISTICS:
        if content == describe_heads(statistics)["heads"]:
            return statistics
    raise CheckpointError(
        f"{path}: its entry heads is {content!r}, which names none of the statistics "
        f"{', '.join(STATISTICS)}; train them again"
    )


def digest(model: nn.Module) -> str:
    """Sixteen digits that tell a network's weights from others."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + b"\0")
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@torch.no_grad()
def evaluate_heads(
    model: ResUNet34, samples: Dataset[Sample], device: torch.device
) -> dict[str, float]:
    """How well heads do on samples without augmentation, in percent, by the head's name.

    With the statistics that the network has; see `use_statistics`. For rotation: how often the
    right one of six transformations is the most likely, of all six of each image. For the others:
    the share of the images' variance about their own mean colours that is explained,
    100·(1 − Σ(σ(output) − x)² / Σ(x − mean colour)²); it may be negative.
    """
    tasks = {name: HEADS_OF[name] for name in HEADS_OF if name != "rot"}
    generator = torch.Generator().manual_seed(0)
    objectives = {head: build_objective(name, generator) for name, head in tasks.items()}
    errors, variance, right = dict.fromkeys(tasks.values(), 0.0), 0.0, 0
    count = length(samples)
    for index in range(count):
        image = samples[index].image.unsqueeze(0).to(device)
        variance += image.var(dim=(2, 3), correction=0).mean().item()
        tell(objectives.values(), "begin_step", image)
        for head, objective in objectives.items():
            error = objective(model, image)
            assert error is not None  # no objective abstains here
            errors[head] += error.item()
        turned, classes = transformed(image)
        right += int((model.auxiliary(turned, "rotation").argmax(dim=1) == classes).sum())
    scores = {head: 100 * (1 - error / variance) for head, error in errors.items()}
    scores["rotation"] = 100 * right / (count * len(ROTATION_VIEWS))
    return {head: scores[head] for head in HEADS}
