"""Further gates, tried on results: every one is fitted on images other than those it is judged on.

The rule's constants came from looking at these pairs. Here they are replaced by what can be learnt
without the target's labels: on the other targets, or on the source alone with shifts made up.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "images features"]
Images = Sequence[dict[str, Any]]
"""What `cues_of` tells of images."""

RULE = (30.0, 4.5, 0.25)
RIDGE = 0.001


@dataclass(frozen=True)
class Cues:
    """Images as tensors, float64.

    Attributes:
        features: 30·ΔE, 4.5·ΔZ, 1 and log(shift), so that the rule's factors are 1, 1, 0.25 and 0.
        cup: the cup's Dice for equidistant weights from 0 to 1.
    """

    features: Features
    cup: Float[Tensor, "images weights"]


def cues(images: Images) -> Cues:
    """The cues of images, in their order."""
    rows = [
        (RULE[0] * each["rounder"], RULE[1] * each["farther"], 1.0, each["shift"])
        for each in images
    ]
    features = torch.tensor(rows, dtype=torch.float64)
    features[:, 3] = features[:, 3].log()
    cup = torch.tensor([each["cup_by_weight"] for each in images], dtype=torch.float64)
    return Cues(features, cup)


def cup_at(cup: Float[Tensor, "images weights"], w: Float[Tensor, " images"]) -> Tensor:
    """The cup's Dice for a weight of each image, between two known ones by a straight line.

    Example:
        >>> cup_at(torch.tensor([[10.0, 20.0, 0.0]]), torch.tensor([0.75])).item()
        10.0
    """
    position = w * (cup.shape[1] - 1)
    low = position.floor().clamp_max(cup.shape[1] - 2)
    left = cup.gather(1, low.long().unsqueeze(1)).squeeze(1)
    right = cup.gather(1, low.long().unsqueeze(1) + 1).squeeze(1)
    return left + (position - low) * (right - left)


def fit_intercept(groups: Sequence[Cues], with_shift: bool) -> Float[Tensor, "4"]:
    """The factors with the highest mean Dice over groups, of the intercept and of the shift only.

    The intercept is one of −2, −1.75, …, 2 at the mean of log(shift), its slope one of −4, −3.5, …,
    4, or 0 without the shift. Among equals the first counts.
    """
    centre = torch.cat([group.features[:, 3] for group in groups]).mean()
    best, chosen = -torch.inf, torch.zeros(4, dtype=torch.float64)
    for slope in torch.arange(-4, 4.1, 0.5).tolist() if with_shift else [0.0]:
        for intercept in torch.arange(-2, 2.1, 0.25).tolist():
            factors = torch.tensor([1.0, 1.0, 0.0, slope], dtype=torch.float64)
            factors[2] = intercept - slope * centre
            value = float(torch.stack([mean_cup(group, factors) for group in groups]).mean())
            if value > best:
                best, chosen = value, factors
    return chosen


def fit_logistic(groups: Sequence[Cues], with_shift: bool) -> Float[Tensor, "4"]:
    """All factors, by logistic regression on which candidate's cup is better.

    Each image counts by how much better it is, and each group the same. A ridge of 0.001 keeps what
    tells nothing at 0.
    """
    used = [0, 1, 2, 3] if with_shift else [0, 1, 2]
    factors = torch.zeros(len(used), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([factors], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        terms = []
        for group in groups:
            gain = group.cup[:, -1] - group.cup[:, 0]
            z = group.features[:, used] @ factors
            costs = torch.nn.functional.softplus(-z * gain.sign()) * gain.abs()
            terms.append(costs.sum() / gain.abs().sum().clamp_min(1e-9))
        total = torch.stack(terms).mean() + RIDGE * factors.square().sum()
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    fitted = torch.zeros(4, dtype=torch.float64)
    fitted[used] = factors.detach()
    return fitted


def weights(group: Cues, factors: Float[Tensor, "4"]) -> Float[Tensor, " images"]:
    """The weight w of each image."""
    return torch.sigmoid(group.features @ factors)


def mean_cup(group: Cues, factors: Float[Tensor, "4"]) -> Float[Tensor, ""]:
    """The mean of the cup's Dice."""
    return cup_at(group.cup, weights(group, factors)).mean()


Fit = Callable[[Sequence[Cues], bool], Float[Tensor, "4"]]


def leave_one_target_out(
    pairs: dict[tuple[str, str], Cues], fit: Fit, with_shift: bool
) -> dict[tuple[str, str], Float[Tensor, "4"]]:
    """For each pair (source, target) the factors fitted on all pairs of other targets."""
    targets = {target for _, target in pairs}
    fitted = {}
    for left_out in targets:
        others = [cues for (_, target), cues in pairs.items() if target != left_out]
        if others:
            fitted[left_out] = fit(others, with_shift)
    return {pair: fitted[pair[1]] for pair in pairs if pair[1] in fitted}


def of_source_alone(
    pairs: Iterable[tuple[str, str]], shifted: dict[str, Cues], with_shift: bool
) -> dict[tuple[str, str], Float[Tensor, "4"]]:
    """For each pair the factors fitted on its source's own images under shifts that are made up."""
    fitted = {source: fit_logistic([cues], with_shift) for source, cues in shifted.items()}
    return {pair: fitted[pair[0]] for pair in pairs if pair[0] in fitted}


def all_gates(
    pairs: dict[tuple[str, str], Cues], shifted: dict[str, Cues]
) -> dict[str, dict[tuple[str, str], Float[Tensor, "4"]]]:
    """By the name of a gate its factors for each pair; without those that lack results."""
    rule = torch.tensor([1.0, 1.0, RULE[2], 0.0], dtype=torch.float64)
    found = {"the rule": dict.fromkeys(pairs, rule)}
    by = "other targets"
    found[f"intercept, by {by}"] = leave_one_target_out(pairs, fit_intercept, False)
    found[f"intercept by the size of the shift, by {by}"] = leave_one_target_out(
        pairs, fit_intercept, True
    )
    found[f"all factors, by {by}"] = leave_one_target_out(pairs, fit_logistic, False)
    found[f"all factors and the size of the shift, by {by}"] = leave_one_target_out(
        pairs, fit_logistic, True
    )
    found["all factors, by the source alone"] = of_source_alone(pairs, shifted, False)
    found["all factors and the size of the shift, by the source alone"] = of_source_alone(
        pairs, shifted, True
    )
    return {name: factors for name, factors in found.items() if factors.keys() == pairs.keys()}
