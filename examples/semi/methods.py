"""The methods that are compared: words of a command line as transforms and losses."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import gradkit as gk
from examples.common.suggestions import did_you_mean
from examples.common.usage import UsageError, require

METHODS = {
    "supervised": "the labelled images alone",
    "fixmatch": "and consistency on unlabelled ones with a mean teacher's pseudo-labels",
    "sam": "and a sharpness-aware step",
    "divergence": "consistency and an f-divergence between labelled and unlabelled images",
    "dim": "consistency, divergence and sharpness",
}
"""What each method trains on."""

DIVERGENCES = (
    "js", "kl", "reverse_kl", "gan", "hellinger", "pearson", "neyman", "tv", "jeffreys",
)  # fmt: skip
LEVELS = ("prob", "feature_gauss", "critic")
PERTURB_ON = ("total", "task", "divergence")
APPLY_AT = ("perturbed", "clean")
CHEAP = ("looksam", "msam")
VARIANTS: dict[str, tuple[str, ...]] = {
    "divergence": DIVERGENCES,
    "level": LEVELS,
    "perturb_on": PERTURB_ON,
    "apply_at": APPLY_AT,
    "sharpness": CHEAP,
}
"""What may follow a method's name, by the field of `Method` that it sets."""


@dataclass(frozen=True)
class Method:
    """One method with its choices. DiM is a reconstruction; see `gk.DiM`.

    Attributes:
        name: one of `METHODS`.
        divergence: name of the f-divergence; None takes `js`, and for `feature_gauss` `hellinger`,
            since JS has no closed form between Gaussians.
        level: whose distributions it is between: pooled class probabilities, Gaussians of the last
            decoder's features, or a critic's view of these.
        perturb_on: what the ascent follows: total, task or divergence.
        apply_at: where the divergence's gradient is taken: perturbed or clean.
        sharpness: a cheaper ascent in SAM's place: looksam (every fifth step) or msam; None is SAM.
    """

    name: str
    divergence: str | None = None
    level: str = "prob"
    perturb_on: str = "total"
    apply_at: str = "perturbed"
    sharpness: str | None = None

    def __str__(self) -> str:
        """The words that `parse_method` makes it from.

        Example:
            >>> str(parse_method("dim:task:kl"))
            'dim:kl:task'
        """
        plain = Method(self.name)
        words = (getattr(self, field) for field in VARIANTS)
        defaults = (getattr(plain, field) for field in VARIANTS)
        chosen = [word for word, default in zip(words, defaults, strict=True) if word != default]
        return ":".join([self.name, *chosen])

    @property
    def is_semi_supervised(self) -> bool:
        """Whether it trains on unlabelled images."""
        return self.name != "supervised"

    @property
    def is_sharp(self) -> bool:
        """Whether its step is taken at displaced weights."""
        return self.name in ("sam", "dim")

    @property
    def has_divergence(self) -> bool:
        """Whether it has the objective "divergence"."""
        return self.name in ("divergence", "dim")


def parse_method(text: str, option: str = "--methods") -> Method:
    """A method from its name and variants, separated by colons.

    Args:
        text: the words.
        option: where they were given, for messages.

    Raises:
        UsageError: a word is unknown, does not fit the method, or is there twice.

    Example:
        >>> method = parse_method("dim:kl:task")
        >>> method.divergence, method.level, method.perturb_on
        ('kl', 'prob', 'task')
    """
    name, *words = text.strip().split(":")
    if name not in METHODS:
        raise UsageError(
            f"{option} contains the unknown name {name!r}; choose from {', '.join(METHODS)}"
            f"{did_you_mean(name, METHODS)}"
        )
    method, chosen = Method(name), dict[str, str]()
    choices = {field: words for field, words in VARIANTS.items() if _applies(field, method)}
    every = [word for words in choices.values() for word in words]
    for word in words:
        field = next((field for field, known in choices.items() if word in known), None)
        if field is None:
            offer = f"choose from {', '.join(every)}" if every else "it has none"
            raise UsageError(
                f"{option} contains {text!r}, where {word!r} is no variant of {name}; {offer}"
                f"{did_you_mean(word, every)}"
            )
        if field in chosen:
            raise UsageError(
                f"{option} contains {text!r}, where {chosen[field]!r} and {word!r} exclude each "
                "other; leave one of them out"
            )
        chosen[field] = word
    return check_method(replace(method, **chosen), text, option)


def parse_methods(text: str) -> dict[str, Method]:
    """Methods by the words that they are written as, separated by commas.

    Raises:
        UsageError: a method is wrong, or there twice.

    Example:
        >>> list(parse_methods("sam, dim:kl"))
        ['sam', 'dim:kl']
    """
    methods = {words.strip(): parse_method(words) for words in text.split(",")}
    require(
        len(set(methods.values())) == len(text.split(",")),
        f"--methods is {text!r}, where a method is there twice; name each once",
    )
    return methods


def _applies(field: str, method: Method) -> bool:
    if field in ("divergence", "level"):
        return method.has_divergence
    return method.name == "dim" or (field == "sharpness" and method.is_sharp)


def check_method(method: Method, text: str, option: str = "--methods") -> Method:
    """The method, if its choices fit each other.

    Args:
        method: to be checked.
        text: the words that it was written as, for messages.
        option: where they were given, for messages.

    Raises:
        UsageError: they do not.
    """
    if method.sharpness is not None and (method.perturb_on, method.apply_at) != (
        "total", "perturbed",
    ):  # fmt: skip
        raise UsageError(
            f"{option} contains {text!r}; with {method.sharpness} the ascent follows the total, "
            "at perturbed weights"
        )
    try:
        if method.has_divergence:
            build_divergence(method, 2, 2)
    except ValueError as error:
        raise UsageError(f"{option} contains {text!r}: {error}") from error
    return method


class Critic(nn.Sequential):
    """Tells features of labelled from those of unlabelled images, pixel by pixel."""

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__(nn.Conv2d(width, hidden, 1), nn.LeakyReLU(0.2), nn.Conv2d(hidden, 1, 1))


def build_divergence(
    method: Method, structures: int, width: int, tolerance: float = 0.0, running: float = 0.0
) -> nn.Module:
    """The divergence of labelled from unlabelled images.

    Args:
        method: that has one. Its module takes logits at the level `prob`, features at the others.
        structures: number of channels of the logits, each with a sigmoid.
        width: number of channels of the features.
        tolerance: what is taken off the divergence, down to 0; not off a critic's.
        running: decay of the running histograms of `prob`; 0 takes each batch's alone.

    Raises:
        ValueError: the divergence has no closed form at this level, or a number is out of range.
    """
    named = {} if method.divergence is None else {"divergence": method.divergence}
    if method.level == "prob":
        return gk.divergence.HistogramDivergence(
            structures, multi_label=True, decay=running, tolerance=tolerance, **named
        )
    if method.level == "feature_gauss":
        features = torch.zeros(2, width)
        module = gk.divergence.GaussianDivergence(tolerance=tolerance, **named)
        module(features, features)  # raises here if there is no closed form
        return module
    return gk.divergence.CriticDivergence(Critic(width), **named)


def build_optimizer(
    method: Method,
    base: torch.optim.Optimizer,
    model: nn.Module,
    rho: float,
    divergence_weight: float,
    ramp: int,
    teacher: gk.EMA,
    **options: Any,
) -> gk.GradientOptimizer:
    """The optimizer whose step is the method's.

    Args:
        method: what to build; its objectives are "task" and, where it has one, "divergence".
        base: optimizer of the network.
        model: all modules whose buffers change.
        rho: radius of the ascent.
        divergence_weight: λ at the end of its ramp.
        ramp: steps after which it is reached.
        teacher: follows each step.
        **options: of `gk.wrap`.
    """
    cheap = {"looksam": lambda: gk.LookSAM(rho=rho, k=5), "msam": lambda: gk.MSAM(rho=rho)}
    ascent = None if method.sharpness is None else cheap[method.sharpness]()
    if method.has_divergence:
        chosen: dict[str, Any] = {"sharpness": ascent}
        if ascent is None:
            chosen = {"rho": rho, "perturb_on": None}
            if method.is_sharp:
                chosen |= {"perturb_on": method.perturb_on, "apply_at": method.apply_at}
        return gk.DiM(
            base, model, divergence_weight=divergence_weight, ramp=ramp, transforms=(teacher,),
            **chosen, **options,
        )  # fmt: skip
    transforms = [ascent or gk.SAM(rho=rho)] if method.is_sharp else []
    return gk.wrap(base, *transforms, teacher, model=model, **options)
