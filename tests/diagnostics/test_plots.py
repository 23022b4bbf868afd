"""Figures show what was recorded."""

import numpy as np
import pytest
import torch
from helpers import seeded
from matplotlib.figure import Figure

import gradkit as gk


def recorded(count, steps=10, *transforms, name="task {}", scale=1.0, **options):
    model = torch.nn.Linear(3, count)
    x = torch.randn(16, 3, generator=seeded(0))
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), *transforms, model=model, **options
    )
    target = torch.randn(16, count, generator=seeded(1)) + model(x).detach().sum(-1, keepdim=True)
    recorder = gk.diagnostics.Recorder(optimizer)

    def losses():
        error = (model(x).sum(-1, keepdim=True) - target).square().mean(0) * scale
        return {name.format(k): error[k] for k in range(count)}

    for _ in range(steps):
        optimizer.step(losses)
    return recorder


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def lines(figure, title):
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_lines_are_the_columns() -> None:
    recorder = recorded(3, 10, gk.RandomWeights(generator=seeded(0)))
    figure = gk.diagnostics.plot(recorder, window=1)
    assert isinstance(figure, Figure)
    assert titles(figure) == ["loss", "gradient norm", "cosine", "weight"]
    shown = lines(figure, "loss")
    assert list(shown) == ["task 0", "task 1", "task 2"]
    for name, line in shown.items():
        np.testing.assert_array_equal(line.get_xdata(), recorder["step"])
        np.testing.assert_array_equal(line.get_ydata(), recorder[f"loss/{name}"])
    cosines = lines(figure, "cosine")
    np.testing.assert_array_equal(
        cosines["task 0, task 2"].get_ydata(), recorder.cosine("task 0", "task 2")
    )
    figure.canvas.draw()  # raises where something cannot be drawn


def test_lines_are_running_means_of_what_lies_behind() -> None:
    recorder = recorded(2)
    losses = recorder["loss/task 1"]
    figure = gk.diagnostics.plot(recorder, window=4)
    line = lines(figure, "loss")["task 1"]
    expected = [losses[max(0, n - 3) : n + 1].mean() for n in range(len(losses))]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    assert titles(figure) == ["loss", "gradient norm", "cosine"]  # weights were 1 throughout


def test_many_pairs_are_a_matrix() -> None:
    recorder = recorded(5)
    figure = gk.diagnostics.plot(recorder)
    (axes,) = (axes for axes in figure.axes if "mean cosine" in axes.get_title())
    shown = axes.images[0].get_array()
    assert shown[1, 3] == shown[3, 1] == recorder.cosine("task 1", "task 3").mean()
    shares = [recorder.conflicts()["task 1", "task 3"]]
    places = {text.get_position(): text.get_text() for text in axes.texts}
    assert places[1, 3] == f"{shares[0]:.0%}"
    figure.canvas.draw()


def drawn(figure):
    """The texts of the legend above all panels, after everything was drawn."""
    figure.canvas.draw()  # raises where a text is no formula but read as one
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("name", ["_{}", "${}$", "$\\frac{{{}}}$"])
def test_names_are_written_as_they_are(name) -> None:
    names = [name.format(k) for k in range(3)]
    figure = gk.diagnostics.plot(recorded(3, name=name))
    assert drawn(figure) == names
    (axes,) = (axes for axes in figure.axes if axes.get_title() == "cosine")
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [
        f"{names[0]}, {names[1]}",
        f"{names[0]}, {names[2]}",
        f"{names[1]}, {names[2]}",
    ]
    figure = gk.diagnostics.plot(recorded(5, name=name))  # with a matrix
    assert drawn(figure) == [name.format(k) for k in range(5)]


def test_numbers_stand_for_long_names() -> None:
    name = "the boundary of organ {} in the portal venous phase"
    figure = gk.diagnostics.plot(recorded(3, name=name))
    assert drawn(figure) == [f"{k}  {name.format(k - 1)}" for k in (1, 2, 3)]
    (axes,) = (axes for axes in figure.axes if axes.get_title() == "cosine")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1, 2", "1, 3", "2, 3"]
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    figure = gk.diagnostics.plot(recorded(1, name=9 * "long" + "{}"))
    assert drawn(figure) == []


@pytest.mark.parametrize("count", [12, 40, 60])
def test_many_objectives_leave_room_for_the_panels(count) -> None:
    recorder = recorded(count, 3, name="objective of a long name {}")
    figure = gk.diagnostics.plot(recorder)
    shown = drawn(figure)
    assert shown == ["each objective", "median"] if count > 28 else len(shown) == count
    loss, norm, matrix, _ = figure.axes
    if count > 28:
        losses = [recorder[f"loss/{name}"] for name in recorder.names]
        np.testing.assert_array_equal(loss.lines[-1].get_ydata(), np.median(losses, axis=0))
    assert matrix.images[0].get_array().shape == (count, count)
    assert len(matrix.get_yticks()) == (count if count < 48 else 0)
    height = figure.get_figheight()
    assert all(axes.get_position().height * height > 1.2 for axes in (loss, norm, matrix))


def test_a_single_step_and_nothing_finite() -> None:
    figure = gk.diagnostics.plot(recorded(2, 1))
    assert lines(figure, "loss")["task 0"].get_marker() == "o"  # a line would not be seen
    recorder = recorded(2, 3, nonfinite="skip", name="{}", scale=float("nan"))
    figure = gk.diagnostics.plot(recorder)
    assert titles(figure) == ["loss"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finite value"]
    figure.canvas.draw()


def test_one_objective_and_steps_without_gradients() -> None:
    recorder = recorded(1, 3)
    figure = gk.diagnostics.plot(recorder)
    assert titles(figure) == ["loss", "gradient norm"]
    assert not figure.legends
    empty = gk.diagnostics.Recorder(gk.wrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])))
    with pytest.raises(ValueError, match="nothing is recorded yet"):
        gk.diagnostics.plot(empty)
    with pytest.raises(ValueError, match="window is 0"):
        gk.diagnostics.plot(recorder, window=0)


def test_a_decay_is_shown_where_it_varies_and_a_gate_always() -> None:
    model = torch.nn.Linear(2, 1)
    x = torch.randn(8, 2, generator=seeded(0))
    gate, decay = "gate: 1 aligned, 0 conflict", "decay of the teacher"
    for teacher, expected in (
        (gk.EMA(model, decay=0.9), []),
        (gk.EMA(model, decay=0.9, warmup=True), [decay]),
        (gk.GatedEMA(model, between=("a", "a2"), warmup=False), [gate]),
    ):
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), teacher, model=model)
        recorder = gk.diagnostics.Recorder(optimizer)
        for _ in range(3):
            optimizer.step({name: lambda: model(x).square().mean() for name in ("a", "a2")})
        figure = gk.diagnostics.plot(recorder)
        assert [title for title in titles(figure) if title in (gate, decay)] == expected
        ticks = figure.axes[0].get_xticks()
        np.testing.assert_array_equal(ticks, ticks.round())


def test_bars_are_the_cosines_by_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x = torch.randn(4, 2, generator=seeded(0))
    gradients = optimizer.gradients(
        {"a": lambda: model(x).square().mean(), "b": lambda: (model(x) - 1).square().mean()}
    )
    (axes,) = gk.diagnostics.plot_parameters(gradients, "a", "b").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = [bar.get_width() for bar in axes.patches]
    assert dict(zip(names, widths, strict=True)) == {
        name: float(value) for name, value in gradients.cosines_by_parameter("a", "b").items()
    }
