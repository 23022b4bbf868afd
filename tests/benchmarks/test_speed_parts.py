"""The benchmark's parts about rules, their weights, many objectives, and adaptation at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradkit as gk
from benchmarks.__main__ import main
from benchmarks.speed import command, memory, rules, stream, timing, tta, weights
from benchmarks.speed.comparison import FLOOR, Comparison, Traffic
from benchmarks.speed.goals import judge, rule_goals, weight_goals
from benchmarks.speed.methods import gradkit_name, pcgrad, weighting
from benchmarks.speed.passes import BATCHED, backward_passes, batched_passes
from benchmarks.speed.peers import PYTORCH_OPTIMIZER, TORCHJD
from benchmarks.speed.problem import CLASSIFIER, Problem, classifier, resunet, transformer
from benchmarks.speed.report import report
from benchmarks.speed.slope import by_objectives, plot_slopes, slope, slope_table
from benchmarks.speed.timing import RATIO, Clock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measurements_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is small here, and no figure need be exact."""
    monkeypatch.setattr(memory, "LIMIT", 120.0)
    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(command, "bandwidth", partial(timing.bandwidth, numbers=1 << 16))


class ByLosses(gk.Reweighing):
    """Weighs objectives by their losses, as loss weightings do."""

    needs_rows = False

    def weigher(self, context: Any) -> Any:
        return lambda gradients: gradients.reweighted(1 / (1 + gradients.losses.abs()))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: rules.exported_rules()[name] for name in ("Mean", "PCGrad")}
    monkeypatch.setattr("benchmarks.speed.command.exported_rules", lambda: few)
    monkeypatch.setattr(weights, "OBJECTIVES", (2, 64))
    monkeypatch.setattr(stream, "RULES", ("PCGrad",))
    monkeypatch.setattr(memory, "measure_one", lambda request: {"value": 1.0})
    arguments = [
        *("--parts", "pcgrad,rules,weights,stream", "--networks", "resunet", "--width", "2"),
        *("--resunet-cases", "2x32", "--goal-cases", "", "--objectives", "2,3"),
        *("--rounds", "1", "--peer-rounds", "1", "--seconds", "0", "--threads", "1"),
        *("--rule-cases", "2x32", "--elementwise-cases", "3x32", "--rule-rounds", "1"),
        *("--weight-seconds", "0", "--stream-objectives", "3", "--stream-width", "4"),
        *("--stream-resunet-width", "2", "--rule-objectives", "3", "--out", str(tmp_path)),
    ]
    assert main(["speed", *arguments]) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    rows = record["rows"]
    assert (tmp_path / "speed-objectives.png").read_bytes()[:4] == b"\x89PNG"

    measured = {(row["case"], row["method"]) for row in rows if row["measure"] == rules.TO_PCGRAD}
    expected = {("2x32", f"{name}, K = 3") for name in few}
    assert measured == {*expected, ("3x32", "PCGrad, K = 3")}
    assert {row["kind"] for row in rows if row["measure"] == rules.TO_FLOOR} == {"Gram"}

    alone = [row for row in rows if row["measure"] == weights.WEIGHTS]
    ours = {(row["case"], row["method"]) for row in alone if row["variant"] == weights.OURS}
    both = {
        (case, f"{name}, K = {count}")
        for case in (weights.RANDOM, weights.CONFLICTING)
        for name in few
        for count in (2, 64)
    }
    assert ours == both | {(weights.BATCH, f"{name}, K = 4") for name in few}
    theirs = {(row["case"], row["method"]) for row in alone if row["variant"] == TORCHJD}
    assert theirs == {place for place in both if "PCGrad" in place[1]}

    many = [row for row in rows if row["measure"] == stream.TO_PASSES]
    assert {(row["method"], row["variant"]) for row in many} == {
        (f"K = {count}", variant)
        for count in (3, 32)
        for variant in (
            FLOOR,
            stream.PLAIN,
            "gradkit, PCGrad, rows kept",
            "gradkit, PCGrad, streamed",
            f"{TORCHJD} autogram, PCGrad",
        )
    }
    plain = [row for row in rows if row["measure"] == stream.TO_PLAIN]
    assert all(row["value"] == 1 for row in plain if row["variant"] == stream.PLAIN)
    assert sum(row["measure"] == stream.MEMORY for row in rows) == 6

    text = report(record)
    for title in ("against the number", "Every rule's step", "Rules by themselves", "Many obj"):
        assert f"## {title}" in text or f"PCGrad {title}" in text
    limits = {goal["method"]: goal["limit"] for goal in record["goals"]}
    assert limits == {"Mean, K = 64": 1000, "PCGrad, K = 64": 1000}


def test_every_rule_that_needs_no_argument_is_measured() -> None:
    found = rules.exported_rules()
    assert {"Mean", "PCGrad", "Sum"} <= found.keys() <= set(gk.surgery.__all__)
    assert not {"Rule", "GramRule", "ElementwiseRule", "Constant", "Aggregate"} & found.keys()
    for name, rule in found.items():
        assert rules.kind_of(rule) in rules.KINDS, name
        assert rules.takes(rule, 4), name


def test_every_rule_makes_a_step() -> None:
    problem = transformer("2x4", 16, 2, CPU)
    rows = rules.measure_rules(problem, rules.exported_rules(), 4, Clock(CPU), 1, seed=0)
    assert {row["variant"] for row in rows} == {gradkit_name("functional")}


def test_a_rule_that_refuses_so_many_is_left_out() -> None:
    class Pair(gk.PCGrad):
        def weigh(self, inputs: Any, memory: Any) -> Any:
            if len(inputs.names) != 2:
                raise ValueError("two, please")
            return super().weigh(inputs, memory)

    assert rules.takes(Pair, 2)
    assert not rules.takes(Pair, 4)
    assert rules.measure_rules(resunet("2x32", 2, CPU), {"P": Pair}, 4, Clock(CPU), 1, 0) == []


def test_a_conflicting_gram_matrix_is_one() -> None:
    for count in weights.OBJECTIVES:
        gram = weights.conflicting_gram(count)
        assert (gram - gram.diag().diag() < 0).sum() == count * (count - 1)
        assert torch.linalg.eigvalsh(gram)[0] > 0


def test_a_peer_that_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(name: str) -> Any:
        return torch.linalg.cholesky  # as solvers do: of singular matrices there is none

    monkeypatch.setattr(weights, "torchjd_weighting", refusing)
    singular = ("singular", 3, torch.zeros(3, 3).double())
    monkeypatch.setattr(weights, "grams", lambda: [singular, ("other", 3, torch.eye(3).double())])
    rows = weights.measure_weights({"Sum": gk.Sum}, Clock(CPU), CPU, 0.0, seed=0)
    assert [(row["case"], row["variant"]) for row in rows] == [
        ("singular", weights.OURS),
        ("other", weights.OURS),
        ("other", TORCHJD),
    ]


def test_goals_for_rules() -> None:
    found = {"PCGrad": gk.PCGrad, "Numbers": gk.surgery.ElementwiseRule}
    row = {"network": "ResUNet-34", "variant": gradkit_name("functional"), "high": 9.0}
    row |= {"value": 2.0, "low": 1.6}
    rows = [
        {**row, "measure": rules.TO_PCGRAD, "case": "2x64", "method": "PCGrad, K = 4"},
        {**row, "measure": rules.TO_FLOOR, "case": "4x128", "method": "Numbers, K = 4", "low": 1.4},
        {**row, "measure": rules.TO_FLOOR, "case": "2x64", "method": "Numbers, K = 4"},
    ]
    judged = judge(rows, rule_goals(found, 4))
    outcomes = [(one["limit"], one["outcome"]) for one in judged]
    assert outcomes == [(1.05, "missed"), (1.5, "open")]
    limits = {goal.method: goal.limit for goal in weight_goals({"UPGrad": gk.PCGrad, **found})}
    assert limits["UPGrad, K = 64"] == 20_000
    assert limits["PCGrad, K = 64"] == 1_000


def test_slope(tmp_path: Path) -> None:
    assert slope({2: 5.0, 4: 9.0, 16: 33.0}) == pytest.approx(2)
    row = {"measure": RATIO, "network": "net", "case": "1x1", "variant": gradkit_name("inplace")}
    rows = [
        {**row, "method": f"PCGrad, K = {k}", "value": 1 + k / 10, "low": 1.0, "high": 9.0}
        | {"excess": 3.0 * k}
        for k in (2, 4)
    ]
    floors = [
        {"network": "net", "case": "1x1", "method": f"PCGrad, K = {k}"}
        | {"reads": 3 * k, "writes": k + 1, "milliseconds": 4 * k + 1.0}
        for k in (2, 4)
    ]
    last = slope_table(rows, floors).splitlines()[-1]
    assert last.endswith("| +0.100 | 3.0 | 4.0 |")
    assert by_objectives(rows[:1]) == {}
    plot_slopes({"rows": rows[:1]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_sample_is_an_objective() -> None:
    problem = classifier(5, 8, CPU)
    model = problem.model()
    losses = problem.losses(model, 5)
    assert len(losses) == 5
    alone = F.cross_entropy(model(problem.x[3:4]), torch.tensor([3]))
    torch.testing.assert_close(losses[3], alone)
    torch.testing.assert_close(problem.loss(model), torch.stack(losses).mean())


def test_all_ways_to_many_objectives_make_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[torch.nn.Module] = []

    def pair(problem: Problem) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        models.append(problem.model())
        return models[-1], torch.optim.SGD(models[-1].parameters(), lr=1.0)

    monkeypatch.setattr(Problem, "pair", pair)
    comparison = stream.many_objectives(classifier(2, 8, CPU), 2)
    makers = {**comparison.ours, **comparison.peers}
    for variant, make in makers.items():
        if "PCGrad" in variant:
            make()()
    first, *others = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in models]
    assert len(others) == 2
    for other in others:
        torch.testing.assert_close(other, first)


def test_loss_weighting_costs_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gk, "RLW", ByLosses, raising=False)
    assert stream.exported(stream.WEIGHTINGS) == ["RLW"]
    problem = resunet("2x32", 2, CPU)
    comparison = weighting(problem, 4, "RLW")
    passes = 0
    backward = torch.autograd.backward
    grad = torch.autograd.grad

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal passes
            passes += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(torch.autograd, "backward", counted(backward))
    monkeypatch.setattr(torch.autograd, "grad", counted(grad))
    for make in (comparison.floor, *comparison.ours.values()):
        step = make()
        passes = 0
        step()
        assert passes == 1


def test_peak_memory_of_kept_rows() -> None:
    request = {"network": CLASSIFIER, "objectives": 8, "width": 1024, "device": "cpu"}
    request |= {"case": "8x256", "variant": "gradkit, PCGrad, rows kept"}
    assert memory.measure_one(request)["value"] > 7.5  # as many rows


def test_peers_that_work_by_pairs_stop_at_few_objectives() -> None:
    problem = resunet("2x32", 2, CPU)
    assert list(pcgrad(problem, 8).peers) == [TORCHJD, PYTORCH_OPTIMIZER, BATCHED]
    assert list(pcgrad(problem, 16).peers) == [TORCHJD, BATCHED]


def test_batched_passes_are_the_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, models = resunet("2x32", 2, CPU), []
    pair = type(problem).pair

    def kept(self: Problem) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = pair(self)
        models.append(model)
        return model, torch.optim.SGD(model.parameters(), lr=1.0)

    monkeypatch.setattr(type(problem), "pair", kept)
    for make in (backward_passes, batched_passes):
        make(problem, 3)()
    start = problem.model().state_dict()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(start["res.conv1.weight"], models[0].state_dict()["res.conv1.weight"])


def test_adaptation_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(problem: Problem) -> list[Comparison]:
        def nothing() -> Callable[[], object]:
            return lambda: problem.x.sum()

        parts = {"floor": nothing, "ours": {tta.AT_ONCE: nothing}, "peers": {}}
        traffic = Traffic((), 0)
        return [
            Comparison(method=method, passes="", traffic=traffic, **parts)
            for method in tta.GOALS_ON_CUDA
        ]

    monkeypatch.setattr(tta, "comparisons", quick)
    arguments = [
        *("--parts", "tta", "--tta-cases", "2x64", "--tta-width", "2", "--networks", "resunet"),
        *("--rounds", "1", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)),
    ]
    assert main(["speed", *arguments]) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    rows = [row for row in record["rows"] if row["measure"] == tta.TO_ONE_BY_ONE]
    assert len(rows) == len(record["rows"]) == 6
    assert {row["method"] for row in rows} == tta.GOALS_ON_CUDA.keys()
    assert "## Adaptation at once" in report(record)
    row = {**rows[1], "value": 0.5, "low": 0.4, "high": 0.6}
    *_, line = tta.tta_table([row], tta.GOALS_ON_CUDA).splitlines()
    assert line.endswith("| 0.50 [0.40, 0.60] | 2.00 | ≥ 1.5: met |")
    slow = {**row, "low": 0.6, "value": 0.7}
    assert tta.tta_table([slow], tta.GOALS_ON_CUDA).endswith("≥ 1.5: open |")
    slower = {**row, "low": 0.9, "value": 1.0}
    assert tta.tta_table([slower], tta.GOALS_ON_CUDA).endswith("≥ 1.5: missed |")


def test_adaptation_at_once_does_what_one_by_one_does() -> None:
    single = resunet("2x64", 2, CPU)
    problem = replace(single, x=single.x.double(), build=lambda: single.build().double())
    compared = tta.comparisons(problem)
    assert [each.method for each in compared] == list(tta.GOALS_ON_CUDA)
    for comparison in compared:
        expected = torch.cat(comparison.floor()())
        for make in comparison.ours.values():
            torch.testing.assert_close(torch.cat(make()()), expected, rtol=1e-7, atol=1e-7)
