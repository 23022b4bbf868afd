"""Training by any of the methods at all centres but one.

Network, split, patches' geometry and iterations are the same for all methods; what differs is the
views of a patch, the losses and the update (`methods`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from examples.aneurysm.inference import score_volumes
from examples.aneurysm.methods import Batch, Method, make_method
from examples.aneurysm.networks import NetworkName, build_network
from examples.aneurysm.patches import PatchDataset
from examples.aneurysm.ranks import gathered, rank, ranks
from examples.aneurysm.settings import TrainingSettings, schedule_factor
from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample, fingerprint, length, split_held_out
from examples.common.metrics import OVERLAPS
from examples.common.scores import mean_scores
from examples.common.training import (
    LAST,
    Entry,
    Objectives,
    Training,
    TrainingError,
    restore,
    train,
)
from gradkit.diagnostics import Recorder

FORMAT = "aneurysm"


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint tells of its network and of the volumes that it takes.

    Attributes:
        network: Which network.
        width: Channels of its first level.
        deep_supervision: Whether it has logits of coarser stages.
        patch: Side of the windows, voxels.
        size: Longest side of the volumes, voxels.
        held_out: The centre that was left out.
        mirror: Whether volumes are also segmented mirrored.
    """

    network: NetworkName
    width: int
    deep_supervision: bool
    patch: int
    size: int
    held_out: str
    mirror: bool

    def build(self, checkpointing: bool = False) -> nn.Module:
        """The network, with weights drawn by torch's generator."""
        return build_network(self.network, self.width, checkpointing, self.deep_supervision)


@dataclass
class Fitted:
    """A training, and what to look at besides its weights.

    Attributes:
        training: As `examples.common.training` has it.
        method: That is trained.
        architecture: Of the network.
        record: Of every step: losses, cosines, and what the gate did.
        best: Path of the best validation's weights.
    """

    training: Training[Batch]
    method: Method
    architecture: Architecture
    record: Recorder
    best: Path


def fit(
    centres: Mapping[str, Dataset[Sample]],
    held_out: str,
    size: int,
    settings: TrainingSettings,
    directory: Path,
    device: torch.device,
    root: str,
    resume: bool = False,
    description: str | None = None,
    on_epoch: Callable[[Entry], None] | None = None,
) -> Fitted:
    """Trains at the given centres, keeps the best validation, and returns the training.

    Every random number is a function of (seed, rank, epoch, index), so that a training that was
    interrupted and resumed ends with the same bits as one that was not.

    Args:
        centres: The volumes of each source centre, of which a fifth is for validation.
        held_out: Name of the centre that is left out.
        size: Longest side of the volumes, voxels.
        settings: Hyper-parameters.
        directory: Where `last.pt` and `best.pt` go.
        device: Where to compute.
        root: Kind of data root, `synthetic` or `folder`.
        resume: Go on from `last.pt` if there is one.
        description: What progress begins with; None shows none.
        on_epoch: Called after each validation.

    Raises:
        CheckpointError: `last.pt` is unreadable or of other settings.
        TrainingError: It is of other data, the loss is no longer finite, or several processes were
            to train a supervised teacher.
        ValueError: A centre has fewer than two volumes.
    """
    fitted = make_training(centres, held_out, size, settings, directory, device, root)
    if resume and (directory / LAST).exists():
        restore(fitted.training, directory / LAST)
    main = rank() == 0
    shown = description if main else None
    train(fitted.training, directory, shown, on_epoch, writes=main, unit="validation")
    return fitted


def make_training(
    centres: Mapping[str, Dataset[Sample]],
    held_out: str,
    size: int,
    settings: TrainingSettings,
    directory: Path,
    device: torch.device,
    root: str,
) -> Fitted:
    """A training before its first step; arguments are those of `fit`.

    Raises:
        TrainingError: Several processes were to train a teacher, too.
    """
    if settings.teacher == "supervised" and ranks() > 1:
        raise TrainingError(
            f"--teacher is supervised and {ranks()} processes train together, which average the "
            "student's gradients only; start one process, without torchrun, or choose frozen"
        )
    method = make_method(settings)
    architecture = Architecture(
        settings.network, settings.width, method.deep_supervision, settings.patch, size, held_out,
        method.mirror,
    )  # fmt: skip
    sources: list[Dataset[Sample]] = []
    held_in: list[Dataset[Sample]] = []
    for samples in centres.values():
        train_indices, validation_indices = split_held_out(length(samples), settings.seed, "volume")
        sources.append(Subset(samples, train_indices))
        held_in.append(Subset(samples, validation_indices))
    validation = ConcatDataset(held_in)
    patches = PatchDataset(
        sources, settings.patch, settings.interval * settings.batch_size, method.foreground,
        method.views, settings.seed, rank(),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = architecture.build(settings.checkpointing)
    network.to(device)
    student: nn.Module = network
    if ranks() > 1:
        student = DistributedDataParallel(network)
    amp = device.type == "cuda" if settings.amp is None else settings.amp
    scaler = torch.amp.GradScaler(device.type, enabled=amp) if amp else None
    optimizer = method.wrap(student, scaler)
    record = Recorder(optimizer)
    teacher = method.teacher
    deployed = network if teacher is None else teacher.eval()
    schedule = method.schedule()
    scheduler = LambdaLR(
        optimizer, lambda step: schedule_factor(schedule, step, settings.iterations)
    )

    def objectives(batch: Batch) -> Objectives:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        return _autocast(method.objectives(student, moved), device, amp)

    def batches(epoch: int) -> Iterable[Batch]:
        patches.epoch = epoch
        return DataLoader(patches, settings.batch_size, num_workers=settings.workers)

    def validate() -> dict[str, float]:
        count = length(validation)
        mine, _ = score_volumes(
            deployed, validation, settings.patch, device, method.mirror, amp,
            range(rank(), count, ranks()),
        )  # fmt: skip
        means = mean_scores(gathered(mine, count))
        return {name: means[name] for name in OVERLAPS}

    # Workers have no say in the result; names are what a message calls them.
    shared = {name: value for name, value in asdict(settings).items() if name != "workers"}
    shared["iterations per validation"] = shared.pop("interval")
    extra: dict[str, Any] = {"record": record}
    if teacher is not None:
        extra = {"teacher": teacher, **extra}
    training = Training(
        network,
        optimizer,
        objectives,
        batches,
        validate,
        select=lambda entry: entry["dsc"],
        settings={**shared, "size": size, "held_out": held_out, "ranks": ranks()},
        data=fingerprint(ConcatDataset(list(centres.values())), root),
        details={"format": FORMAT, "architecture": asdict(architecture)},
        scheduler=scheduler,
        extra=extra,
        kept=() if teacher is None else ("teacher",),
        count=lambda batch: len(batch["label"]),
    )
    return Fitted(training, method, architecture, record, directory / "best.pt")


def load_network(path: Path) -> tuple[nn.Module, Architecture]:
    """Reads the network that a training has kept, in evaluation mode on the CPU.

    It is the teacher where there is one, else the student.

    Raises:
        CheckpointError: The file is missing, unreadable or of another kind.
    """
    content = load(path)
    remedy = "pass the best.pt of a training of this example"
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a network of this example; {remedy}")
    try:
        architecture = Architecture(**content["architecture"])
        with torch.random.fork_rng(devices=[]):
            network = architecture.build()
        network.load_state_dict(content.get("teacher", content["model"]))
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its network cannot be restored; {remedy}") from error
    return network.eval(), architecture


def _autocast(objectives: Objectives, device: torch.device, enabled: bool) -> Objectives:
    """Objectives whose closures compute in half precision, where `enabled`."""
    if not enabled:
        return objectives

    def within(closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(device.type, torch.float16):
                return closure()

        return run

    if callable(objectives):
        return within(objectives)
    return {name: within(closure) for name, closure in objectives.items()}
