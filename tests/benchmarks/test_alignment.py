"""The comparison of strategies: its problems, its arithmetic and its command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import gradkit as gk
from benchmarks.__main__ import main
from benchmarks.alignment import Alignment, digits, fronts, fundus, strategies, toy
from benchmarks.alignment.descent import descend
from benchmarks.alignment.intervals import mean_interval, paired_interval
from benchmarks.alignment.report import report
from benchmarks.alignment.summary import summarise
from benchmarks.alignment.training import train

POINTS = [(-8.5, 7.5), (9.0, 9.0), (1.0, 2.0), (3.0, -4.0), (-7.5, -0.5), (0.0, -8.0)]


def toy_by_hand(a: float, b: float) -> tuple[float, float]:
    """The formulas as CAGrad's code has them, in plain floats."""
    f1 = math.log(max(abs(0.5 * (-a - 7) - math.tanh(-b)), 5e-6)) + 6
    f2 = math.log(max(abs(0.5 * (-a + 3) + math.tanh(-b) + 2), 5e-6)) + 6
    g1 = ((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    g2 = ((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    c1, c2 = max(math.tanh(0.5 * b), 0), max(math.tanh(-0.5 * b), 0)
    return c1 * f1 + c2 * g1, c1 * f2 + c2 * g2


@pytest.mark.parametrize("point", POINTS)
def test_toy_losses_and_gradients(point: tuple[float, float]) -> None:
    theta = torch.tensor(point, dtype=torch.float64)
    assert toy.toy_losses(theta).tolist() == pytest.approx(toy_by_hand(*point), rel=1e-12)
    rows = torch.autograd.functional.jacobian(toy.toy_losses, theta)
    step = 1e-6
    for axis in range(2):
        high, low = list(point), list(point)
        high[axis] += step
        low[axis] -= step
        ends = zip(toy_by_hand(*high), toy_by_hand(*low), strict=True)
        slopes = [(up - down) / (2 * step) for up, down in ends]
        assert rows[:, axis].tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-7)


def test_toy_losses_at_known_points() -> None:
    # tanh(−4) g1 with (7 − 7)² + 0 = 0; ln 1 where |0.5·(7 + 7) − tanh 8| ≈ 6 is not.
    losses = toy.toy_losses(torch.tensor([7.0, -8.0], dtype=torch.float64))
    assert losses.tolist() == pytest.approx([-20 * math.tanh(4), -0.4 * math.tanh(4)])
    assert toy.toy_losses(torch.zeros(2)).tolist() == [0, 0]
    # In the valley's floor the logarithm is cut off.
    floor = torch.tensor([-7 + 2 * math.tanh(3.0), 3.0], dtype=torch.float64)
    least = math.tanh(1.5) * (math.log(5e-6) + 6)
    assert toy.toy_losses(floor)[0].item() == pytest.approx(least)
    mirrored = toy.toy_losses(torch.tensor([[-3.0, 2.0], [3.0, 2.0]]))
    assert mirrored[0].tolist() == pytest.approx(mirrored[1].flip(0).tolist())


def test_toy_front() -> None:
    front = toy.toy_front()
    middle = front[len(front) // 2]
    assert middle.tolist() == pytest.approx([0, -8.3552], abs=1e-4)  # CAGrad's segment
    # No point of a fine grid is better in both losses than a point of the front.
    line = torch.linspace(-11, 11, 441, dtype=torch.float64)
    grid = toy.toy_losses(torch.cartesian_prod(line, line))
    for point in toy.toy_losses(front[::20]):
        assert not ((grid < point - 1e-9).all(-1)).any()
    assert toy.shortfall(front[::20]).abs().max() < 1e-9
    assert toy.shortfall(torch.tensor([0.0, 0.0])) > 10
    assert bool((toy.toy_losses(torch.cartesian_prod(line, line)) + toy.OFFSET > 0).all())


def zdt_by_hand(number: int, x: np.ndarray[Any, Any]) -> list[float]:
    g = 1 + 9 * x[1:].sum() / (len(x) - 1)
    ratio = x[0] / g
    second = {
        1: 1 - np.sqrt(ratio),
        2: 1 - ratio**2,
        3: 1 - np.sqrt(ratio) - ratio * np.sin(10 * np.pi * x[0]),
    }[number]
    return [float(x[0]), float(g * second)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_zdt_functions(number: int) -> None:
    problem = fronts.PROBLEMS[f"zdt{number}"]
    x = np.random.default_rng(number).random(30)
    found = problem.function(torch.from_numpy(x))
    assert found.tolist() == pytest.approx(zdt_by_hand(number, x))
    free = problem.start(3)
    assert problem.size == len(free) == 30
    inside = problem.inside(free)
    assert float(inside.min()) > 0.0199
    assert float(inside.max()) < 0.9801
    assert torch.equal(free, problem.start(3))
    torch.testing.assert_close(problem.losses(free), problem.function(inside))


def test_fonseca_function() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 20)
    shift = 1 / math.sqrt(20)
    by_hand = [1 - math.exp(-sum((x - sign * shift) ** 2)) for sign in (1, -1)]
    assert fronts.fonseca(torch.from_numpy(x)).tolist() == pytest.approx(by_hand)


def test_fronts_are_the_analytic_ones() -> None:
    for key, second in (("zdt1", lambda f1: 1 - f1.sqrt()), ("zdt2", lambda f1: 1 - f1**2)):
        front = fronts.front(key)
        assert len(front) == 2001
        assert front[[0, -1]].tolist() == [[0, 1], [1, 0]]
        torch.testing.assert_close(front[:, 1], second(front[:, 0]))
    front = fronts.front("fonseca")
    f1 = front[:, 0]
    s = 1 - (-(1 - f1).log()).clamp(min=0).sqrt()
    torch.testing.assert_close(front[:, 1], 1 - (-((s + 1) ** 2)).exp(), atol=1e-6, rtol=1e-6)
    assert float(f1.max()) == pytest.approx(1 - math.exp(-4))
    # The five pieces of ZDT3 as they are usually given.
    f1 = fronts.front("zdt3")[:, 0]
    gaps = ((f1[1:] - f1[:-1]) > 0.01).nonzero()[:, 0]
    ends = [0.0, *torch.stack([f1[gaps], f1[gaps + 1]], -1).flatten().tolist(), float(f1[-1])]
    usual = [0, 0.0830, 0.1822, 0.2577, 0.4093, 0.4538, 0.6183, 0.6525, 0.8233, 0.8518]
    assert ends == pytest.approx(usual, abs=1e-3)


def test_distance_to_the_front() -> None:
    values = torch.tensor([[0.25, 0.5], [1.0, 1.0], [0.0, 1.2]])
    found = fronts.distance("zdt1", values)
    assert float(found[0]) == pytest.approx(0, abs=1e-3)
    f1 = np.linspace(0, 1, 100_001)
    by_hand = np.hypot(1 - f1, 1 - (1 - np.sqrt(f1))).min()
    assert float(found[1]) == pytest.approx(by_hand, abs=1e-5)
    assert float(found[2]) == pytest.approx(0.2)


def test_residual() -> None:
    zdt1 = fronts.PROBLEMS["zdt1"]
    x = torch.zeros(30)
    x[0] = 0.3
    assert fronts.residual(zdt1, x) < 1e-3  # on the front, against the bounds
    x[1:] = 0.5
    assert fronts.residual(zdt1, x) == pytest.approx(0.3)  # what f1 alone would move
    fonseca = fronts.PROBLEMS["fonseca"]
    assert fronts.residual(fonseca, torch.full((20,), 0.1)) < 1e-3
    # Beside the segment both gradients point away from it.
    x = torch.full((20,), 0.1)
    x[0], x[1] = 0.4, -0.2
    assert fronts.residual(fonseca, x) > 0.1


def test_descent_is_adam_on_the_sum_and_repeats() -> None:
    start = torch.tensor([-8.5, 7.5])
    runs = [descend(toy.toy_losses, 21, start, "Sum", 0, 0.01, 20) for _ in range(2)]
    assert torch.equal(runs[0].path, runs[1].path)
    point = start.clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=0.01)
    for _ in range(20):
        adam.zero_grad()
        toy.toy_losses(point).sum().backward()
        adam.step()
    torch.testing.assert_close(runs[0].path[-1], point.detach())


def test_a_failing_strategy_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(gk.Sum):
        def weigh(self, inputs: Any, memory: Any) -> Any:
            raise ValueError("needs\nmore objectives")

    monkeypatch.setitem(strategies.STRATEGIES, "Mean", Broken)
    done = descend(toy.toy_losses, 0, torch.ones(2), "Mean", 0, 0.01, 5)
    assert done.error == "ValueError: needs more objectives"
    assert len(done.path) == 1
    rows, _ = toy.run_toy(["Sum", "Mean"], 0.01, 2, 1)
    record = {
        "problem": "toy",
        "title": "",
        "command": "",
        "machine": {},
        "about": "",
        "rows": rows,
    }
    assert "- Mean: ValueError: needs more objectives" in report(record)


def test_strategies_are_made_anew_and_seeded() -> None:
    assert strategies.REFERENCE in strategies.STRATEGIES
    for name in strategies.STRATEGIES:
        assert strategies.build(name, 3, 0) is not strategies.build(name, 3, 0)
    orders = [strategies.build("PCGrad", 3, seed).draw(8).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert set(strategies.suitable(2)) == {
        name for name in strategies.suitable(3) if name not in strategies.FEWEST_OBJECTIVES
    }


def test_digits_are_divided_before_they_are_joined() -> None:
    parts = [digits.pool(part) for part in ("train", "validation", "test")]
    places = torch.cat([part.places for part in parts])
    assert sorted(places.tolist()) == list(range(1797))
    assert [len(part.places) for part in parts] == [1077, 360, 360]
    # No image of one part is another's, even under a different number.
    images = [{part.images[n].numpy().tobytes() for n in range(len(part.images))} for part in parts]
    assert not images[2] & (images[0] | images[1])
    for part in parts:
        shares = part.classes.bincount(minlength=10) / len(part.classes)
        assert float((shares - 0.1).abs().max()) < 0.01


def test_digits_are_joined_with_their_labels() -> None:
    pool = digits.pool("test")
    pairs = digits.join(pool, 50, torch.Generator().manual_seed(0))
    assert pairs.images.shape == (50, 1, 8, 16)
    by_image = {pool.images[n].numpy().tobytes(): int(pool.classes[n]) for n in range(360)}
    for image, (left, right, parity) in zip(pairs.images, pairs.targets.tolist(), strict=True):
        assert by_image[image[0, :, :8].contiguous().numpy().tobytes()] == left
        assert by_image[image[0, :, 8:].contiguous().numpy().tobytes()] == right
        assert parity == (left + right) % 2
    again = digits.join(pool, 50, torch.Generator().manual_seed(0))
    assert torch.equal(pairs.images, again.images)


def test_digits_accuracy() -> None:
    pool = digits.pool("test")
    pairs = digits.join(pool, 20, torch.Generator().manual_seed(0))

    class Oracle(torch.nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            answers = {
                task: torch.nn.functional.one_hot(pairs.targets[:, n], size).float()
                for n, (task, size) in enumerate(digits.TASKS.items())
            }
            answers["left"][:5] = 0  # class 0, which is wrong unless it is 0
            return answers

    wrong = int((pairs.targets[:5, 0] != 0).sum())
    assert digits.accuracies(Oracle(), pairs) == [100 - 5 * wrong, 100, 100]


def test_batches_pass_over_all_pairs() -> None:
    orders = digits.orders(130, torch.Generator().manual_seed(0))
    epoch = [next(orders) for _ in range(3)]
    assert [len(places) for places in epoch] == [64, 64, 2]
    assert sorted(torch.cat(epoch).tolist()) == list(range(130))


def test_conflicts_are_counted() -> None:
    model = torch.nn.Linear(2, 1, bias=False)

    def objectives() -> dict[str, Tensor]:
        a, b = model.weight[0]
        return {"a": a + b, "b": -a + 0.5 * b, "c": a - b}  # a·b < 0, a·c = 0, b·c < 0

    done = train(model, [objectives] * 4, "Sum", 3, 0, 0.1, 4)
    assert done.conflict == pytest.approx(2 / 3)
    assert done.error is None


def test_intervals() -> None:
    generator = np.random.default_rng(0)
    values, reference = generator.normal(90, 1, 5), generator.normal(89, 1, 5)
    mean, low, high = mean_interval(values.tolist())
    expected = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert mean == pytest.approx(values.mean())
    found = paired_interval(values.tolist(), reference.tolist())
    test = stats.ttest_rel(values, reference)
    assert found[1:] == pytest.approx(tuple(test.confidence_interval(0.95)))
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_summary_pairs_seeds() -> None:
    base = {"conflict": 0.5, "milliseconds": 1.0, "error": None}
    rows: list[dict[str, Any]] = [
        *({"strategy": "Sum", "score": value, **base} for value in (1.0, 5.0, 9.0)),
        *({"strategy": "Mean", "score": value, **base} for value in (2.0, 6.0, 10.0)),
        *({"strategy": "PCGrad", "score": 0.0, **base, "error": "no"} for _ in range(3)),
    ]
    plain, mean, failed = summarise(rows, ["score"])
    assert plain["score"]["mean"] == 5
    assert mean["score, difference"] == {"mean": 1, "low": 1, "high": 1}
    assert "score, difference" not in plain
    assert failed == {"strategy": "PCGrad", "n": 3, "error": "no"}


def test_summary_without_conflicts() -> None:
    row = {"score": 1.0, "conflict": None, "milliseconds": 1.0, "error": None}
    lines = summarise([{"strategy": "Sum", **row}, {"strategy": "Sum", **row}], ["score"])
    assert lines[0]["conflict"] is None


def test_a_folder_is_no_part_of_the_command() -> None:
    command = Alignment("fundus", data="/home/someone/fundus", seeds=3)
    expected = "python -m benchmarks alignment --problem fundus --seeds 3 --data DATA"
    assert command.command_line() == expected


def run(*words: str, out: Path) -> dict[str, Any]:
    assert main(["alignment", *words, "--out", str(out)]) == 0
    problem = words[words.index("--problem") + 1]
    record: dict[str, Any] = json.loads((out / f"{problem}.json").read_text())
    text = (out / f"{problem}.md").read_text()
    assert f"python -m benchmarks alignment {' '.join(words)}" in text
    for name in ("Sum", "PCGrad"):
        assert f"| {name} |" in text
    return record


def without_times(rows: Any) -> Any:
    return [{k: v for k, v in row.items() if k != "milliseconds"} for row in rows]


@pytest.mark.parametrize(
    ("problem", "options", "pictures"),
    [
        ("toy", (), ["toy"]),
        ("fonseca", ("--seeds", "2"), ["fonseca"]),
        ("zdt", ("--seeds", "2"), ["zdt1", "zdt2", "zdt3"]),
        ("digits", ("--seeds", "2"), ["digits"]),
    ],
)
def test_command(
    problem: str,
    options: tuple[str, ...],
    pictures: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digits, "TEST_PAIRS", 50)
    words = ("--problem", problem, "--strategies", "Sum,PCGrad", "--steps", "3", *options)
    record, again = (run(*words, out=tmp_path / name) for name in ("one", "two"))
    assert without_times(record["rows"]) == without_times(again["rows"])
    assert record["machine"]["threads"] == "1"
    for name in pictures:
        assert (tmp_path / "one" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("options", [("--strategies", "Sum"), ("--lr", "1e30")])
def test_without_a_difference_there_is_neither_picture_nor_section(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference alone, or where it fails."""
    monkeypatch.setattr(digits, "TEST_PAIRS", 50)
    words = ["--problem", "digits", "--strategies", "Sum,PCGrad", "--steps", "4", "--seeds", "2"]
    assert main(["alignment", *words, *options, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "digits.png").exists()
    assert "Minus Sum" not in (tmp_path / "digits.md").read_text()


def test_fundus_command(tmp_path: Path) -> None:
    words = ("--problem", "fundus", "--strategies", "PCGrad", "--steps", "1", "--seeds", "2")
    data = ("--data", "synthetic", "--held-out", "centre_a", "--images", "1", "--width", "2")
    record = run(*words, *data, out=tmp_path)
    assert [row["strategy"] for row in record["rows"]] == ["Sum", "PCGrad", "Sum", "PCGrad"]
    for row in record["rows"]:
        scores = {centre: sum(both) / 2 for centre, both in row["scores"].items()}
        assert row["unseen"] == pytest.approx(scores.pop("centre_a"))
        assert row["seen"] == pytest.approx(sum(scores.values()) / 4)
        assert row["error"] is None


def test_fundus_batches() -> None:
    setting = fundus.Setting("synthetic", 64, 2, 3, 1e-3, 1)
    stream = fundus.batches(setting, "centre_b", 0)
    first, second = next(stream), next(stream)
    assert first[0].shape == (3, 3, 64, 64)
    assert first[1].shape == (3, 2, 64, 64)
    assert not torch.equal(first[0].sort(0).values, second[0].sort(0).values)  # varied anew
    again = next(fundus.batches(setting, "centre_b", 0))
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy", "--seeds", "2"), "--seeds is not for toy"),
        (("toy", "--strategies", "Sum,Nothing"), "unknown name 'Nothing'"),
        (("toy", "--steps", "0"), "--steps is 0; choose at least 1"),
        (("toy", "--lr", "-1"), "--lr is -1.0; choose a positive number"),
        (("fonseca", "--workers", "0"), "--workers is 0"),
        (("zdt", "--validation"), "--validation is not for zdt, but for digits"),
        (("digits", "--seeds", "1"), "an interval needs at least 2"),
        (("digits", "--data", "synthetic"), "--data is not for digits"),
        (("fundus",), "--data is missing"),
        (("fundus", "--data", "/nowhere"), "/nowhere is not a folder"),
        (("fundus", "--data", "synthetic", "--held-out", "x"), "unknown name 'x'"),
        (("fundus", "--data", "synthetic", "--size", "65"), "--size is 65"),
    ],
)
def test_command_refuses(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["alignment", "--problem", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_refuses_an_unknown_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["alignment", "--problem", "nothing"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
