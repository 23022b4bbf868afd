"""Figures of what steps did to gradients; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradkit.core.arguments import check_count
from gradkit.core.gradients import Gradients
from gradkit.diagnostics.recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

# Okabe and Ito's colours, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
# More pairs of objectives are shown as a matrix.
_LINES = 6
# A matrix of more objectives lies below the other panels, and one of still more has no labels.
_BESIDE, _LABELLED = 8, 48
# More objectives than these cannot be told apart as lines.
_STYLED = len(_COLOURS) * len(_STYLES)
# Longer names are in the legend only, with a number that stands for them elsewhere.
_LONG = 16


def plot(recorder: Recorder, *, window: int | None = None) -> Figure:
    """Draw the recorded steps: losses, norms and cosines, and weights and factors where they vary.

    Lines are running means, over pale points. With more than six pairs of objectives the cosines
    are a matrix of means, and with up to eight objectives the share of steps in conflict is written
    in it. With more than 28 objectives their lines are pale, under their median. Numbers stand
    for long names, in the order of `recorder.names`.

    Args:
        recorder: The recorder.
        window: How many recorded steps a running mean is over; by default a fiftieth of them.

    Returns:
        A matplotlib figure; `figure.savefig("steps.png")` writes it.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If nothing was recorded, or if `window` is not positive.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.PCGrad())
        >>> with gk.diagnostics.Recorder(optimizer) as recorder:
        ...     for _ in range(3):
        ...         _ = optimizer.step({"a": lambda: w[0].square(), "b": lambda: w[1] - w[0]})
        >>> [axes.get_title() for axes in gk.diagnostics.plot(recorder).axes]
        ['loss', 'gradient norm', 'cosine', 'weight']
    """
    columns = recorder.columns()
    if not len(recorder):
        raise ValueError("nothing is recorded yet; plot after the first step")
    if window is None:
        window = max(1, len(recorder) // 50)
    check_count("window", window)
    names, steps = recorder.names, columns["step"]
    cosines = {pair: recorder.cosine(*pair) for pair in combinations(names, 2)}
    cosines = {pair: values for pair, values in cosines.items() if np.isfinite(values).any()}
    matrix = len(cosines) > _LINES
    labels = _labels(names)
    panels: dict[str, dict[str, NDArray[np.float64]]] = {
        "loss": {name: columns[f"loss/{name}"] for name in names},
        "gradient norm": {name: columns[f"norm/{name}"] for name in names},
    }
    if not matrix:
        panels["cosine"] = {f"{labels[a]}, {labels[b]}": x for (a, b), x in cosines.items()}
    weights = {name: columns[f"weight/{name}"] for name in names}
    if any(_varies(each) for each in weights.values()):
        panels["weight"] = weights
    if _varies(columns["lr_scale"]):
        panels["factor of the learning rate"] = {"": columns["lr_scale"]}
    if "gate" in columns:
        panels["gate: 1 aligned, 0 conflict"] = {"": columns["gate"]}
    if "decay" in columns and _varies(columns["decay"]):
        panels["decay of the teacher"] = {"": columns["decay"]}
    panels = {title: lines for title, lines in panels.items() if title == "loss" or _known(lines)}
    below = 0.0
    if matrix and len(names) > _BESIDE:
        below = 0.6 + 0.17 * len(names) if len(names) <= _LABELLED else 5.0
    figure, grid = _grid(len(panels) + matrix, below=below)
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        handles = _draw(axes, steps, lines, window)
        axes.set_title(title, fontsize=10)
        if title == "cosine":
            texts = axes.legend(
                handles, [str(handle) for handle in handles], fontsize=8
            ).get_texts()
            _write(texts, [*lines])
            axes.axhline(0, color="0.6", linewidth=0.8)
            limit = 1.1 * max(np.nanmax(np.abs(values)) for values in lines.values())
            axes.set_ylim(-limit or -1.0, limit or 1.0)
        if title == "loss" and len(names) > 1:
            _draw_legend(figure, handles, names, labels)
        if title in ("loss", "gradient norm"):
            _scale(axes, np.concatenate([*lines.values()]))
    if matrix:
        _draw_matrix(grid[-1], cosines, recorder.conflicts(), labels)
    return figure


def plot_parameters(gradients: Gradients, a: str, b: str) -> Figure:
    """Draw the cosine of two objectives' gradients in each parameter: where they are in conflict.

    Args:
        gradients: What `optimizer.gradients(objectives)` returned.
        a: An objective.
        b: Another objective.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no objective of such a name.

    Examples:
        >>> import torch, gradkit as gk
        >>> net = torch.nn.Linear(1, 2)
        >>> optimizer = gk.wrap(torch.optim.SGD(net.parameters(), lr=0.1), model=net)
        >>> x = torch.ones(1, 1)
        >>> gradients = optimizer.gradients({"a": lambda: net(x).sum(), "b": lambda: -net(x)[0, 0]})
        >>> (axes,) = gk.diagnostics.plot_parameters(gradients, "a", "b").axes
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['weight', 'bias']
    """
    cosines = {
        str(name): float(value) for name, value in gradients.cosines_by_parameter(a, b).items()
    }
    figure, (axes,) = _grid(1, height=min(1.0 + 0.22 * len(cosines), 200.0))
    values = np.array([*cosines.values()])
    colours = [_COLOURS[1] if value < 0 else _COLOURS[0] for value in values]
    axes.barh(np.arange(len(values)), values, color=colours)
    axes.set_yticks(np.arange(len(values)), labels=[*cosines], fontsize=8, parse_math=False)
    axes.set_ylim(len(values) - 0.4, -0.6)  # the first parameter on top
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    names = f"{_shortened(a, 30)} and {_shortened(b, 30)}"
    axes.set_xlabel(f"cosine of the gradients of {names}", parse_math=False)
    return figure


def _grid(count: int, height: float = 2.6, below: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many panels, two or three in a row; the last below them, of its own height."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib: pip install 'gradkit[plot]'", name=error.name
        ) from error
    above = count - (below > 0)
    across = 2 if above in (2, 4) else min(above, 3)
    heights = [height] * -(-above // across) + [below] * (below > 0)
    figure = Figure(figsize=(max(6.4, 3.6 * across), sum(heights)), layout="constrained")
    cells = figure.add_gridspec(len(heights), across, height_ratios=heights)
    grid = [figure.add_subplot(cells[n // across, n % across]) for n in range(above)]
    if below:
        grid.append(figure.add_subplot(cells[-1, :]))
    return figure, grid


def _draw(
    axes: Axes,
    steps: NDArray[np.float64],
    lines: Mapping[str, NDArray[np.float64]],
    window: int,
) -> list[Line2D]:
    """Draw lines, and return those that a legend names."""
    many = len(lines) > _STYLED
    drawn = []
    for number, (label, values) in enumerate(lines.items()):
        there = np.isfinite(values)
        colour = "0.8" if many else _COLOURS[number % len(_COLOURS)]
        style = "-" if many else _STYLES[number // len(_COLOURS)]
        if window > 1 and not many:
            axes.plot(steps[there], values[there], ".", color=colour, alpha=0.2, markersize=2)
        look = {"color": colour, "label": label}
        drawn += _draw_line(axes, steps[there], values[there], window, style, **look)
    if many:
        values = np.array([*lines.values()])
        values[~np.isfinite(values)] = np.nan
        some = np.flatnonzero(np.isfinite(values).any(axis=0))
        median = np.nanmedian(values[:, some], axis=0)
        drawn = drawn[:1] + _draw_line(axes, steps[some], median, window, "-", color=_COLOURS[0])
    if not _known(lines):
        axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes, fontsize=8)
    axes.set_xlabel("step", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(labelsize=8)
    return drawn


def _draw_line(
    axes: Axes,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    window: int,
    style: str,
    **look: Any,
) -> list[Line2D]:
    """A running mean, or a point where there is one value."""
    shown = _running_mean(values, window) if len(values) else values
    marker = "o" if len(values) == 1 else ""
    return axes.plot(steps, shown, style, marker=marker, markersize=4, linewidth=1.4, **look)


def _labels(names: Sequence[str]) -> dict[str, str]:
    """What stands for each objective on an axis or in a pair."""
    if max(map(len, names)) > _LONG:
        return {name: str(number) for number, name in enumerate(names, 1)}
    return {name: name or "''" for name in names}


def _shortened(text: str, length: int) -> str:
    """A text without its middle, where it is longer."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def _draw_legend(
    figure: Figure, handles: Sequence[Line2D], names: Sequence[str], labels: Mapping[str, str]
) -> None:
    """The objectives above all panels, for which the figure becomes higher."""
    letters = int(10 * figure.get_figwidth())
    texts = [f"{labels[name]}  {name}" if len(name) > _LONG else labels[name] for name in names]
    if len(names) > _STYLED:
        texts = ["each objective", "median"]
    texts = [_shortened(text, letters) for text in texts]
    across = min(6, max(1, letters // (max(map(len, texts)) + 6)))
    rows = -(-len(texts) // across)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    legend = figure.legend(
        handles,
        [str(handle) for handle in handles],
        loc="outside upper center",
        ncols=-(-len(texts) // rows),
        frameon=False,
    )
    _write(legend.get_texts(), texts)


def _write(places: Sequence[Text], texts: Sequence[str]) -> None:
    """Write names as they are: a "_" before a name does not hide it, and "$" is no formula."""
    for place, text in zip(places, texts, strict=True):
        place.set_parse_math(False)
        place.set_text(text)


def _scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic axis where positive values differ much."""
    from matplotlib.ticker import LogLocator, NullLocator

    known = values[np.isfinite(values)]
    if not len(known) or known.min() <= 0 or known.max() <= 20 * known.min():
        return
    axes.set_yscale("log")
    few = known.max() < 1000 * known.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_matrix(
    axes: Axes,
    cosines: Mapping[tuple[str, str], NDArray[np.float64]],
    conflicts: Mapping[tuple[str, str], float],
    labels: Mapping[str, str],
) -> None:
    place = {name: number for number, name in enumerate(labels)}
    few = len(labels) <= _BESIDE
    mean = np.full((len(labels), len(labels)), np.nan)
    for (a, b), values in cosines.items():
        i, j = place[a], place[b]
        mean[i, j] = mean[j, i] = values[np.isfinite(values)].mean()
    limit = max(0.1, np.nanmax(np.abs(mean)))
    for a, b in cosines if few else ():
        i, j = place[a], place[b]
        if np.isfinite(conflicts[a, b]):
            colour = "white" if abs(mean[i, j]) > 0.6 * limit else "black"
            text = f"{conflicts[a, b]:.0%}"
            axes.text(i, j, text, ha="center", va="center", fontsize=7, color=colour)
    image: Any = axes.imshow(
        mean, cmap="RdBu", vmin=-limit, vmax=limit, aspect="equal" if few else "auto"
    )
    ticks, texts = range(len(labels)), [*labels.values()]
    if len(labels) > _LABELLED:
        ticks, texts = range(0), []
    axes.set_xticks(ticks, labels=texts, fontsize=8, rotation=90, parse_math=False)
    axes.set_yticks(ticks, labels=texts, fontsize=8, parse_math=False)
    title = "mean cosine, share of conflicts" if few else "mean cosine"
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of each value and those before it, of `window` in all, or as many as there are."""
    sums = np.convolve(values, np.ones(window))[: len(values)]
    means: NDArray[np.float64] = sums / np.minimum(np.arange(1, len(values) + 1), window)
    return means


def _varies(values: NDArray[np.float64]) -> bool:
    known = values[np.isfinite(values)]
    return len(known) > 1 and bool(known.max() > known.min())


def _known(lines: Mapping[str, NDArray[np.float64]]) -> bool:
    return any(np.isfinite(values).any() for values in lines.values())
