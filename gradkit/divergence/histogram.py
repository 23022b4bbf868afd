"""The divergence between the class histograms of two domains."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_count, check_number
from gradkit.divergence.floor import finite_logs, in_float32, raised
from gradkit.divergence.named import f_divergence


def log_histogram(
    logits: Float[Tensor, "batch channels *positions"], *, multi_label: bool = False
) -> Float[Tensor, " channels"]:
    """The logarithm of each class's mean probability, over all images and positions.

    Computed in log-space, in float32 or wider: classes that are nowhere predicted keep a gradient.

    Args:
        logits: A network's outputs.
        multi_label: Whether the channels do not exclude each other, so that probabilities are
            sigmoids and not a softmax.

    Raises:
        ValueError: If there are no images or no positions.

    Examples:
        >>> logits = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]).log()
        >>> log_histogram(logits).exp()
        tensor([0.4000, 0.6000])
    """
    (logits,) = in_float32(logits)
    logs = F.logsigmoid(logits) if multi_label else F.log_softmax(logits, 1)
    logs = finite_logs(logs).transpose(0, 1).flatten(1)
    if logs.shape[1] == 0:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have no positions, and so no histogram; leave "
            "the divergence out where a domain has no images"
        )
    return torch.logsumexp(logs, 1) - math.log(logs.shape[1])


class HistogramDivergence(nn.Module):
    """max(0, D(P‖Q) − δ) of the class histograms that a network predicts for two domains.

    P and Q are mean probabilities over all images and positions of a batch; see `log_histogram`. A
    loss on them asks for equal shares of the classes in both domains, which they may not have: the
    tolerance δ allows for some difference. The histogram of few images is noisy (D is too large by
    about ½·f''(1)·(C − 1)·(1/n + 1/m) for n and m independent positions): running histograms of
    decay d average over about 1/(1 − d) batches,

        h ← d_t·h + (1 − d_t)·(this batch's),   d_t = min(d, t/(t + 1))

    and the gradient flows through this batch's share 1 − d_t only, which scales it. Histograms are
    averages of all batches until there are 1/(1 − d) of them.

    They are buffers, as BatchNorm's statistics are, and move in training mode only. Make the module
    a part of `model=` in `wrap`: then buffers are put back with a step that fails or is skipped,
    and `gk.DiM` (any chain with `DivergenceWeight` in it) tells the module when a step begins. The
    histograms move at the step's first evaluation, and all its evaluations start from those of the
    step before. Without that, every call in training mode counts as a new batch. Histograms are in
    the module's own state dict. Use one module for one divergence. On several ranks D is that of
    each rank's part of the batch; `DistributedDataParallel` keeps the first rank's histograms, as
    it does with all buffers.

    Args:
        channels: C, the number of classes.
        divergence: The name of an f-divergence; see `gk.f_divergence`.
        multi_label: Whether the channels do not exclude each other: D is the mean over channels of
            divergences between (p, 1 − p) and (q, 1 − q).
        decay: d in [0, 1); 0 takes each batch by itself.
        tolerance: δ ≥ 0, in units of D; taken after D(P‖P) = −2·ln 2 of "gan" has been subtracted.
        normalize: Whether D is divided by f''(1); see `gk.f_divergence`.
        **arguments: Further arguments of `gk.f_divergence`, `alpha=`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range; when called, if there are not C
            channels, or no images.

    Examples:
        >>> import torch, gradkit as gk
        >>> divergence = gk.divergence.HistogramDivergence(channels=3)
        >>> source = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> divergence(source, torch.tensor([[0.5, 0.3, 0.2]]).log())
        tensor(0.0438)
        >>> gk.divergence.HistogramDivergence(3, tolerance=0.1)(source, source.flip(1))
        tensor(0.4062)
    """

    log_histograms: Tensor
    log_before: Tensor
    batches: Tensor

    def __init__(
        self,
        channels: int,
        divergence: str = "js",
        *,
        multi_label: bool = False,
        decay: int | float = 0.0,
        tolerance: int | float = 0.0,
        normalize: bool = False,
        **arguments: float,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        if channels == 1 and not multi_label:
            raise ValueError(
                "channels is 1, and the softmax of a single class is always 1; pass "
                "multi_label=True for a sigmoid"
            )
        check_number("decay", decay, least=0, below=1)
        check_number("tolerance", tolerance, least=0)
        self.divergence = f_divergence(divergence, normalize=normalize, **arguments)
        self.multi_label = multi_label
        self.decay = decay
        self.tolerance = tolerance
        self.channels = channels
        self.register_buffer("log_histograms", torch.zeros(2, channels))
        self.register_buffer("log_before", torch.zeros(2, channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._told = False
        self._begun = False

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.divergence}, multi_label={self.multi_label}, "
            f"decay={self.decay}, tolerance={self.tolerance}"
        )

    def forward(
        self,
        source: Float[Tensor, "batch_p channels *positions_p"],
        target: Float[Tensor, "batch_q channels *positions_q"],
    ) -> Float[Tensor, ""]:
        """The divergence of two batches of logits.

        Args:
            source: Logits of the domain P.
            target: Logits of the domain Q.
        """
        for name, logits in (("source", source), ("target", target)):
            if logits.dim() < 2 or logits.shape[1] != self.channels:
                raise ValueError(
                    f"{name} has shape {tuple(logits.shape)}; pass logits with {self.channels} "
                    "channels in the second dimension"
                )
        logs = torch.stack(
            in_float32(*(log_histogram(x, multi_label=self.multi_label) for x in (source, target)))
        )
        if self.decay > 0:
            logs = self._followed(logs)
        value = self.divergence.between(logs[0], logs[1], multi_label=self.multi_label)
        return F.relu(value - self.divergence.offset - self.tolerance)

    def begin_step(self) -> None:
        """Say that the next call in training mode is the first evaluation of a new step."""
        self._told = self._begun = True

    def _followed(self, logs: Float[Tensor, "2 C"]) -> Float[Tensor, "2 C"]:
        """The running histograms with this batch's."""
        again = self.training and self._told and not self._begun
        before, t = self.log_histograms.clone(), self.batches.clone()
        if again:
            before, t = self.log_before.clone(), t - 1
        t = t.to(logs)
        decay = (t / (t + 1)).clamp(max=self.decay)
        old = before.to(logs) + torch.log(decay)
        new = torch.logaddexp(old, raised(logs, -1e4) + torch.log1p(-decay))
        if self.training and not again:
            self._begun = False
            with torch.no_grad():
                self.log_before.copy_(before)
                self.log_histograms.copy_(new)
                self.batches.add_(1)
        return new
