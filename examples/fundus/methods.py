"""The methods of `compare --methods`: what each is called, how it is made, and what it needs.

The benchmark's tables take their rows from the same descriptions (`benchmarks.tta.variants`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.common.adaptation import parse_statistics
from examples.fundus.fusion import FIXED
from examples.fundus.gate import CupGate, CupRatio
from gradkit import tta


@dataclass(frozen=True)
class Chosen:
    """What the caller of `build_adapter` chooses; each method takes what it has a use for."""

    statistics: str
    lr: float
    seed: int
    ratio: CupRatio | None

    def generator(self) -> torch.Generator:
        """A new generator with the seed."""
        return torch.Generator().manual_seed(self.seed)


Make = Callable[[nn.Module, Chosen], tta.Adapter]


@dataclass(frozen=True)
class Method:
    """A method of adaptation.

    Attributes:
        title: what tables call it.
        make: from the source model and what is chosen to an adapter.
        statistics: its statistics, in words; None where they are chosen, as is the learning rate.
        heads: whether it needs a network with auxiliary heads.
        ratio: whether it needs the ratio of cup to disc in the source's labels.
        target_first: images of a batch, where it sees all of the target before it predicts.
    """

    title: str
    make: Make
    statistics: str | None
    heads: bool = False
    ratio: bool = False
    target_first: int | None = None

    @property
    def learns(self) -> bool:
        """Whether the statistics and the learning rate are the caller's choice."""
        return self.statistics is None


def denoise(model: Any, images: Tensor) -> Tensor:
    """Logits of the images without noise, by a network's denoising head."""
    logits: Tensor = model.auxiliary(images, "denoising")
    return logits


def _detta(model: nn.Module, chosen: Chosen, **options: Any) -> tta.Adapter:
    """With the noise that the head is trained on."""
    generator = chosen.generator()
    return tta.DeTTA(model, denoise, noise="gaussian", generator=generator, **options)


def _gated(model: nn.Module, chosen: Chosen) -> tta.Adapter:
    if chosen.ratio is None:
        raise ValueError("gated needs the ratio of cup to disc in the source's labels")
    return tta.Fuse(model, gate=CupGate(chosen.ratio))


DECODER = ("up1", "up2", "up3", "up4", "bnout")  # of ResUNet-34, which PASS does not align
BOTTLENECK = "res.layer4"  # of ResUNet-34, whose output gets PASS's shape prompts

METHODS: dict[str, Method] = {
    "none": Method("No Adapt", lambda model, _: tta.NoAdapt(model), "source"),
    "ptbn": Method("PTBN", lambda model, _: tta.PTBN(model), "test"),
    "tent": Method(
        "TENT",
        lambda model, chosen: tta.TENT(model, chosen.lr, parse_statistics(chosen.statistics)),
        None,
    ),
    "grata": Method(
        "GraTa",
        lambda model, chosen: tta.GraTa(
            model, chosen.lr, parse_statistics(chosen.statistics), generator=chosen.generator()
        ),
        None,
    ),
    # With their published settings.
    "dua": Method("DUA", lambda model, _: tta.DUA(model), "running"),
    "diga": Method("DIGA", lambda model, _: tta.DIGA(model), "mixed:0.8"),
    "medbn": Method("MedBN", lambda model, _: tta.MedBN(model), "median"),
    "dltta": Method("DLTTA", lambda model, _: tta.DLTTA(model), "test"),
    "domainadaptor": Method(
        "DomainAdaptor", lambda model, _: tta.DomainAdaptor(model), "mixed:0.5"
    ),
    "detta": Method("DeTTA", _detta, "test", heads=True),
    "detta-released": Method(
        "DeTTA, released: the whole target first",
        lambda model, chosen: _detta(model, chosen, preset="released"),
        "running",
        heads=True,
        target_first=8,
    ),
    "sar": Method("SAR, literal threshold", lambda model, _: tta.SAR(model), "test"),
    "sar-scaled": Method(
        "SAR, scaled threshold", lambda model, _: tta.SAR(model, reset_threshold="scaled"), "test"
    ),
    "eata": Method("EATA", lambda model, _: tta.EATA(model), "test"),
    "cotta": Method(
        "CoTTA", lambda model, chosen: tta.CoTTA(model, generator=chosen.generator()), "test"
    ),
    "rotta": Method(
        "RoTTA", lambda model, chosen: tta.RoTTA(model, generator=chosen.generator()), "running"
    ),
    "memo": Method("MEMO", lambda model, _: tta.MEMO(model), "mixed:0.94"),
    "pass": Method(
        "PASS without shape prompts",
        lambda model, chosen: tta.PASS(
            model, excluded=DECODER, class_weights=(5, 1), generator=chosen.generator()
        ),
        "running",
    ),
    "pass-shapes": Method(  # which learn from the decoder's layers only
        "PASS",
        lambda model, chosen: tta.PASS(
            model, class_weights=(5, 1), generator=chosen.generator(), prompted=BOTTLENECK
        ),
        "running",
    ),
    "deyo": Method(
        "DeYO", lambda model, chosen: tta.DeYO(model, generator=chosen.generator()), "test"
    ),
    "vptta": Method("VPTTA", lambda model, _: tta.VPTTA(model), "warm-up"),
    "intent": Method("InTEnt", lambda model, _: tta.InTEnt(model), "integrated"),
    "intent-balanced": Method(
        "InTEnt, balanced", lambda model, _: tta.InTEnt(model, score="balanced"), "integrated"
    ),
    # Two fusions of predictions under several statistics.
    "fused": Method(
        "Fuse, fixed weights of disc and cup",
        lambda model, _: tta.Fuse(model, weights=FIXED),
        "source and mixed:0.2",
    ),
    "gated": Method("Fuse, gated", _gated, "source and mixed:0.2", ratio=True),
}
"""By name, in the order of the tables."""

BY_DEFAULT = ("none", "ptbn", "tent", "grata")
"""The methods that `compare` runs if none are named."""


def build_adapter(
    name: str,
    model: nn.Module,
    statistics: str = "test",
    lr: float = 1e-4,
    seed: int = 0,
    ratio: CupRatio | None = None,
) -> tta.Adapter:
    """A fresh adapter of a copy of the source model.

    Args:
        name: one of `METHODS`.
        model: the source model, which is not changed; for methods that need heads one with trained
            heads, whose outputs are `model.auxiliary(images, head)`. Of such a model, the other
            methods adapt `model.without_heads()`: no head takes part in what they do or draw.
        statistics: see `parse_statistics`; for methods that leave it open, as the next.
        lr: learning rate of Adam.
        seed: of the random numbers that a method draws.
        ratio: of cup to disc in the source's labels, for methods that need it.

    Raises:
        ValueError: an argument is out of range, or the method needs what is not there.
    """
    method = METHODS.get(name)
    if method is None:
        raise ValueError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    if method.heads and not hasattr(model, "auxiliary"):
        raise ValueError(
            f"{name} adapts by an auxiliary head, which {type(model).__name__} lacks: give it "
            "a method auxiliary(images, head)"
        )
    if not method.heads and getattr(model, "auxiliary_heads", False):
        model = model.without_heads()
    return method.make(model, Chosen(statistics, lr, seed, ratio))
