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

# Okabe and Ito's colours, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
# More pairs of objectives are shown as a matrix.
_LINES = 6


def plot(recorder: Recorder, *, window: int | None = None) -> Figure:
    """Draw the recorded steps: losses, norms and cosines, and weights and factors where they vary.

    Lines are running means, over pale points where steps are few. With more than six pairs of
    objectives, the cosines are a matrix of means, and the share of steps in conflict is written in
    it.

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
    pairs = [pair for pair in combinations(names, 2) if np.isfinite(recorder.cosine(*pair)).any()]
    losses = {name: columns[f"loss/{name}"] for name in names}
    panels: dict[str, dict[str, NDArray[np.float64]]] = {
        "loss": losses,
        "gradient norm": {name: columns[f"norm/{name}"] for name in names},
    }
    if 0 < len(pairs) <= _LINES:
        panels["cosine"] = {f"{a}, {b}": recorder.cosine(a, b) for a, b in pairs}
    weights = {name: columns[f"weight/{name}"] for name in names}
    if any(_varies(each) for each in weights.values()):
        panels["weight"] = weights
    if _varies(columns["lr_scale"]):
        panels["factor of the learning rate"] = {"": columns["lr_scale"]}
    for name, title in (("gate", "gate: 1 aligned, 0 conflict"), ("decay", "decay of the teacher")):
        if name in columns:
            panels[title] = {"": columns[name]}
    panels = {title: lines for title, lines in panels.items() if _known(lines)}
    matrix = len(pairs) > _LINES
    figure, grid = _grid(len(panels) + matrix)
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        _draw(axes, steps, lines, window)
        axes.set_title(title, fontsize=10)
        if title == "cosine":
            axes.legend(fontsize=8, frameon=False)
            axes.axhline(0, color="0.6", linewidth=0.8)
            limit = 1.1 * max(np.nanmax(np.abs(values)) for values in lines.values())
            axes.set_ylim(-limit or -1.0, limit or 1.0)
        if title in ("loss", "gradient norm"):
            _scale(axes, np.concatenate([*lines.values()]))
    if matrix:
        _draw_matrix(grid[len(panels)], recorder, names)
    if len(names) > 1:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=4 if len(names) > 6 else 6,
            frameon=False,
        )
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
    figure, (axes,) = _grid(1, height=1.0 + 0.22 * len(cosines))
    values = np.array([*cosines.values()])
    colours = [_COLOURS[1] if value < 0 else _COLOURS[0] for value in values]
    axes.barh(np.arange(len(values)), values, color=colours)
    axes.set_yticks(np.arange(len(values)), labels=[*cosines], fontsize=8)
    axes.invert_yaxis()  # the first parameter on top
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel(f"cosine of the gradients of {a} and {b}")
    return figure


def _grid(count: int, height: float = 2.6) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many panels, two or three in a row."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib: pip install 'gradkit[plot]'", name=error.name
        ) from error
    across = 2 if count in (2, 4) else min(count, 3)
    down = -(-count // across)
    size = (max(6.4, 3.6 * across), height * down)
    figure = Figure(figsize=size, layout="constrained")
    grid: list[Axes] = [*figure.subplots(down, across, squeeze=False).flat]
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _draw(
    axes: Axes,
    steps: NDArray[np.float64],
    lines: Mapping[str, NDArray[np.float64]],
    window: int,
) -> None:
    for number, (label, values) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
        there = np.isfinite(values)
        if window > 1:
            axes.plot(steps[there], values[there], ".", color=colour, alpha=0.2, markersize=2)
        shown = _running_mean(values[there], window) if there.any() else values[there]
        axes.plot(steps[there], shown, style, color=colour, linewidth=1.4, label=label)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)


def _scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic axis where positive values differ much."""
    from matplotlib.ticker import LogLocator, NullLocator

    known = values[np.isfinite(values)]
    if known.min() <= 0 or known.max() <= 20 * known.min():
        return
    axes.set_yscale("log")
    few = known.max() < 1000 * known.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_matrix(axes: Axes, recorder: Recorder, names: Sequence[str]) -> None:
    conflicts = recorder.conflicts()
    mean = np.full((len(names), len(names)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        values = recorder.cosine(a, b)
        known = values[np.isfinite(values)]
        if len(known):
            mean[i, j] = mean[j, i] = known.mean()
            share = conflicts[a, b]
            if np.isfinite(share) and len(names) <= 8:
                texts[i, j] = f"{share:.0%}"
    limit = max(0.1, np.nanmax(np.abs(mean)))
    for (i, j), text in texts.items():
        colour = "white" if abs(mean[i, j]) > 0.6 * limit else "black"
        axes.text(i, j, text, ha="center", va="center", fontsize=7, color=colour)
    image: Any = axes.imshow(mean, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(names)), labels=[*names], fontsize=8, rotation=90)
    axes.set_yticks(range(len(names)), labels=[*names], fontsize=8)
    axes.set_title("mean cosine, share of conflicts", fontsize=10)
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
