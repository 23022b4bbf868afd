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

    Examples:
        >>> logits = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]).log()
        >>> log_histogram(logits).exp()
        tensor([0.4000, 0.6000])
    """
    (logits,) = in_float32(logits)
    logs = F.logsigmoid(logits) if multi_label else F.log_softmax(logits, 1)
    logs = finite_logs(logs).transpose(0, 1).flatten(1)
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
    a part of `model=` in `wrap`: then buffers move once a step, at the first evaluation, and are
    put back with a step that fails or is skipped. They are in the module's own state dict. On
    several ranks D and histograms are those of each rank's part of the batch.

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
        ValueError: If an argument is outside its range; when called, if there are not C channels.

    Examples:
        >>> import torch, gradkit as gk
        >>> divergence = gk.divergence.HistogramDivergence(channels=3)
        >>> source = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> divergence(source, torch.tensor([[0.5, 0.3, 0.2]]).log())
        tensor(0.0438)
        >>> gk.divergence.HistogramDivergence(3, tolerance=0.1)(source, source.flip(1))
        tensor(0.4062)
    """

    log_source: Tensor
    log_target: Tensor
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
        self.register_buffer("log_source", torch.zeros(channels))
        self.register_buffer("log_target", torch.zeros(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return (
            f"{self.log_source.numel()}, {self.divergence}, multi_label={self.multi_label}, "
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
        channels = self.log_source.numel()
        for name, logits in (("source", source), ("target", target)):
            if logits.dim() < 2 or logits.shape[1] != channels:
                raise ValueError(
                    f"{name} has shape {tuple(logits.shape)}; pass logits with {channels} channels "
                    "in the second dimension"
                )
        logs = [log_histogram(each, multi_label=self.multi_label) for each in (source, target)]
        if self.decay > 0:
            logs = self._followed(logs)
        value = self.divergence.between(*in_float32(*logs), multi_label=self.multi_label)
        return F.relu(value - self.divergence.offset - self.tolerance)

    def _followed(self, logs: list[Tensor]) -> list[Tensor]:
        """The running histograms with this batch's; in training mode they are kept."""
        t = self.batches.to(logs[0].dtype)
        decay = (t / (t + 1)).clamp(max=self.decay)
        held = (self.log_source, self.log_target)
        old = [each.detach().to(decay.dtype) + torch.log(decay) for each in held]
        new = [
            torch.logaddexp(before, raised(now, -1e4) + torch.log1p(-decay))
            for before, now in zip(old, logs, strict=True)
        ]
        if self.training:
            with torch.no_grad():
                for buffer, value in zip(held, new, strict=True):
                    buffer.copy_(value)
                self.batches.add_(1)
        return new
