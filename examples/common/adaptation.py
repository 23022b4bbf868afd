"""Online test-time adaptation over one target centre, by the protocol of GraTa.

Chen et al., https://arxiv.org/abs/2408.07343: images come one at a time in list order; the model
adapts by one step on each and then predicts it; what it has learnt stays until the target ends.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from examples.common.metrics import Scorer, segment
from examples.common.progress import Progress
from examples.common.scores import CaseScores
from examples.common.suggestions import did_you_mean
from gradkit import tta

METHODS = ("none", "ptbn", "tent", "grata")
LEARNING_METHODS = ("tent", "grata")  # those with a learning rate and a choice of statistics

HEADED_METHODS = ("detta",)  # those that need a network with auxiliary heads


def denoise(model: Any, images: Tensor) -> Tensor:
    """Logits of the images without noise, by a network's denoising head."""
    logits: Tensor = model.auxiliary(images, "denoising")
    return logits


DECODER = ("up1", "up2", "up3", "up4", "bnout")  # of ResUNet-34, which PASS does not align
BOTTLENECK = "res.layer4"  # of ResUNet-34, whose output gets PASS's shape prompts

Generator = torch.Generator
PUBLISHED: dict[str, tuple[str, Callable[[nn.Module, Generator], tta.Adapter]]] = {
    "dua": ("running", lambda model, _: tta.DUA(model)),
    "diga": ("mixed:0.8", lambda model, _: tta.DIGA(model)),
    "medbn": ("median", lambda model, _: tta.MedBN(model)),
    "dltta": ("test", lambda model, _: tta.DLTTA(model)),
    "domainadaptor": ("mixed:0.5", lambda model, _: tta.DomainAdaptor(model)),
    "detta": (
        "test",
        lambda model, generator: tta.DeTTA(model, denoise, noise="gaussian", generator=generator),
    ),
    "sar": ("test", lambda model, _: tta.SAR(model)),
    "sar-scaled": ("test", lambda model, _: tta.SAR(model, reset_threshold="scaled")),
    "eata": ("test", lambda model, _: tta.EATA(model)),
    "cotta": ("test", lambda model, generator: tta.CoTTA(model, generator=generator)),
    "rotta": ("running", lambda model, generator: tta.RoTTA(model, generator=generator)),
    "memo": ("mixed:0.94", lambda model, _: tta.MEMO(model)),
    "pass": (
        "running",
        lambda model, generator: tta.PASS(
            model, excluded=DECODER, class_weights=(5, 1), generator=generator
        ),
    ),
    "pass-shapes": (  # which learn from the decoder's layers only
        "running",
        lambda model, generator: tta.PASS(
            model, class_weights=(5, 1), generator=generator, prompted=BOTTLENECK
        ),
    ),
    "deyo": ("test", lambda model, generator: tta.DeYO(model, generator=generator)),
    "vptta": ("warm-up", lambda model, _: tta.VPTTA(model)),
    "intent": ("integrated", lambda model, _: tta.InTEnt(model)),
    "intent-balanced": ("integrated", lambda model, _: tta.InTEnt(model, score="balanced")),
}
"""Further methods with their published defaults: their statistics, and how they are made."""

CHOICES = (*METHODS, *PUBLISHED)


def parse_statistics(text: str) -> str | tta.Mixed:
    """Where normalisation layers take mean and variance, from the words of a command line.

    Args:
        text: `source`, `test` or `mixed:SHARE`, with the share of the source in [0, 1].

    Raises:
        ValueError: the text is none of these.

    Example:
        >>> parse_statistics("test")
        'test'
    """
    if text == "source" or text == "test":
        return text
    kind, _, share = text.partition(":")
    try:
        if kind == "mixed":
            return tta.Mixed(float(share))
    except ValueError:  # no number, or not a share
        pass
    guess = "" if kind == "mixed" else did_you_mean(kind, ("source", "test", "mixed"))
    raise ValueError(
        f"statistics are {text!r}; choose source, test, or mixed:SHARE with the source's "
        f"share between 0 and 1, such as mixed:0.8{guess}"
    )


def statistics_of(method: str, chosen: str) -> str:
    """The statistics that a method really uses: only those that learn leave a choice.

    Example:
        >>> statistics_of("ptbn", "mixed:0.8")
        'test'
    """
    if method in PUBLISHED:
        return PUBLISHED[method][0]
    return {"none": "source", "ptbn": "test"}.get(method, chosen)


def build_adapter(
    method: str, model: nn.Module, statistics: str = "test", lr: float = 1e-4, seed: int = 0
) -> tta.Adapter:
    """A fresh adapter of a copy of the source model.

    Args:
        method: one of `CHOICES`.
        model: the source model, which is not changed; for `HEADED_METHODS` one with trained heads,
            whose outputs are `model.auxiliary(images, head)`. Of such a model, the other methods
            adapt `model.without_heads()`: no head takes part in what they do or draw.
        statistics: see `parse_statistics`; for `LEARNING_METHODS`.
        lr: learning rate of Adam; for `LEARNING_METHODS`. `PUBLISHED` have their own.
        seed: of the random numbers that a method draws.

    Raises:
        ValueError: an argument is out of range.
    """
    if method not in HEADED_METHODS and getattr(model, "auxiliary_heads", False):
        model = model.without_heads()
    if method == "none":
        return tta.NoAdapt(model)
    if method == "ptbn":
        return tta.PTBN(model)
    if method == "tent":
        return tta.TENT(model, lr=lr, statistics=parse_statistics(statistics))
    generator = torch.Generator().manual_seed(seed)
    if method in HEADED_METHODS and not hasattr(model, "auxiliary"):
        raise ValueError(
            f"{method} adapts by an auxiliary head, which {type(model).__name__} lacks: give it "
            "a method auxiliary(images, head)"
        )
    if method in PUBLISHED:
        return PUBLISHED[method][1](model, generator)
    if method == "grata":
        return tta.GraTa(model, lr=lr, statistics=parse_statistics(statistics), generator=generator)
    raise ValueError(f"there is no method {method!r}; choose one of {', '.join(CHOICES)}")


@dataclass
class Stream:
    """What adapting over one target came to.

    Attributes:
        scores: one per case, in the order of the stream.
        predictions: of the cases asked for, by their index; [structures, *space].
        cosines: of the pseudo and the auxiliary gradient, one per case; GraTa only.
        lr_scales: factor that this cosine puts on the learning rate, one per case; GraTa only.
    """

    scores: list[CaseScores] = field(default_factory=list)
    predictions: dict[int, Bool[Tensor, "structures ..."]] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)
    lr_scales: list[float] = field(default_factory=list)


def adapt_online(
    adapter: tta.Adapter,
    samples: Dataset[Sample],
    device: torch.device,
    score: Scorer,
    keep: Collection[int] = (),
    description: str | None = None,
    unit: str = "image",
) -> Stream:
    """Adapts to one sample after another, in order, and scores the prediction of each.

    Targets are used for nothing but the score.

    Args:
        adapter: fresh, or as an earlier stream left it.
        samples: in the order of the stream.
        device: where the adapter's model is.
        score: takes prediction and target of one sample on the CPU.
        keep: indices of the samples whose predictions to return.
        description: of the progress on standard error; None shows none.
        unit: what a sample is called there, in the singular.
    """
    stream = Stream()
    count = length(samples)
    with Progress(count, description, unit) as progress:
        for index in range(count):
            sample = samples[index]
            logits = adapter(sample.image.unsqueeze(0).to(device))
            prediction = segment(logits[0].float().cpu())
            stream.scores.append(CaseScores(sample.name, score(prediction, sample.target)))
            if index in keep:
                stream.predictions[index] = prediction
            step = adapter.last_step
            if step is not None and {"pseudo", "auxiliary"} <= set(step.names):
                stream.cosines.append(float(step.cosine("pseudo", "auxiliary")))
                stream.lr_scales.append(float(step.lr_scale))
            progress.update()
    return stream
