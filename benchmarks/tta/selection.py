"""Choosing a composition for a target without a look at it: leave one target out.

Of all compositions the one is taken for a target that is best on average over the pairs in which
that centre is neither target nor source: its labels are known in neither role. What it then comes
to on the target is an honest estimate of what choosing so is worth; the best composition in
hindsight is not.
"""

from collections.abc import Mapping
from statistics import mean

from benchmarks.tta.summary import Scores, pair_means


def choose(compositions: Mapping[str, Scores], target: str) -> str:
    """The composition with the highest mean over the pairs without this centre.

    Args:
        compositions: scores by name, for the same pairs; of equals the first is taken.
        target: the centre to choose for.

    Raises:
        ValueError: no pair is left, as there are fewer than three centres.

    Example:
        >>> pairs = [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")]
        >>> first = {pair: [80.0] for pair in pairs}
        >>> second = {pair: [90.0 if "a" in pair else 70.0] for pair in pairs}
        >>> choose({"first": first, "second": second}, "a")
        'first'
    """

    def value(name: str) -> float:
        means = pair_means(compositions[name])
        return mean(own for pair, own in means.items() if target not in pair)

    if not any(target not in pair for scores in compositions.values() for pair in scores):
        raise ValueError(f"no pair of centres is without {target}; at least three are needed")
    return max(compositions, key=value)


def best(compositions: Mapping[str, Scores], target: str) -> str:
    """The composition that is best on the target itself, in hindsight."""
    return max(
        compositions,
        key=lambda name: mean(
            own for (_, other), own in pair_means(compositions[name]).items() if other == target
        ),
    )


def left_out(compositions: Mapping[str, Scores], choices: Mapping[str, str]) -> Scores:
    """The scores of each pair by the composition that is chosen for its target.

    Args:
        compositions: scores by name.
        choices: names by target.
    """
    pairs = next(iter(compositions.values()))
    return {pair: compositions[choices[pair[1]]][pair] for pair in pairs}
