"""Online test-time adaptation over one target centre, by the protocol of GraTa.

Chen et al., https://arxiv.org/abs/2408.07343: images come one at a time in list order; the model
adapts by one step on each and then predicts it; what it has learnt stays until the target ends.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from examples.common.metrics import Scorer, segment
from examples.common.progress import Progress
from examples.common.scores import CaseScores
from examples.common.suggestions import did_you_mean
from gradkit import tta


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


@dataclass
class Stream:
    """What adapting over one target came to.

    Attributes:
        scores: one per case, in the order of the stream; empty ones of cases without labels.
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
    target_first: int | None = None,
) -> Stream:
    """Adapts to one sample after another, in order, and scores the prediction of each.

    Targets are used for nothing but the score. Samples without labels are predicted all the same.

    Args:
        adapter: fresh, or as an earlier stream left it.
        samples: in the order of the stream.
        device: where the adapter's model is.
        score: takes prediction and target of one sample on the CPU.
        keep: indices of the samples whose predictions to return.
        description: of the progress on standard error; None shows none.
        unit: what a sample is called there, in the singular.
        target_first: adapt to all samples in batches of this many before the first prediction, and
            to none after it.
    """
    stream = Stream()
    count = length(samples)
    predict: Callable[[Tensor], Tensor] = adapter
    if target_first is not None:
        predict = adapt_first(adapter, samples, device, target_first, description, unit)
    with Progress(count, description, unit) as progress:
        for index in range(count):
            sample = samples[index]
            logits = predict(sample.image.unsqueeze(0).to(device))
            prediction = segment(logits[0].float().cpu())
            scores = score(prediction, sample.target) if sample.has_labels else {}
            stream.scores.append(CaseScores(sample.name, scores))
            if index in keep:
                stream.predictions[index] = prediction
            step = adapter.last_step
            if step is not None and {"pseudo", "auxiliary"} <= set(step.names):
                stream.cosines.append(float(step.cosine("pseudo", "auxiliary")))
                stream.lr_scales.append(float(step.lr_scale))
            progress.update()
    return stream


def adapt_first(
    adapter: tta.Adapter,
    samples: Dataset[Sample],
    device: torch.device,
    batch_size: int,
    description: str | None = None,
    unit: str = "image",
) -> Callable[[Tensor], Tensor]:
    """Adapts to all samples, in order and in batches; the rest is as for `adapt_online`.

    Returns:
        Predicts without adapting.
    """
    count = length(samples)
    what = None if description is None else f"{description}, before it predicts"
    with Progress(count, what, unit) as progress:
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            adapter.adapt(torch.stack([samples[number].image for number in numbers]).to(device))
            for _ in numbers:
                progress.update()
    return torch.no_grad()(adapter.model)
