"""The benchmarks run, and their figures are what they say."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from children import ROOT

from benchmarks.__main__ import main
from benchmarks.fundus import STRATEGIES, pooled_interval
from benchmarks.speed import command, memory, overhead, timing
from benchmarks.speed.comparison import FLOOR, Comparison, Step, Traffic
from benchmarks.speed.goals import Goal, judge, outcome, verdict
from benchmarks.speed.grata import grata
from benchmarks.speed.gsema import MEAN_TEACHER, gs_ema
from benchmarks.speed.methods import gated_ema, gradkit_name, pcgrad, sam
from benchmarks.speed.passes import BATCHED
from benchmarks.speed.peak import CONTROL
from benchmarks.speed.plot import plot
from benchmarks.speed.problem import resunet, transformer, wide_mlp
from benchmarks.speed.report import report
from benchmarks.speed.timing import (
    RATIO,
    Clock,
    Rounds,
    median_interval,
    summarise,
    time_in_turn,
)
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, save_source_model


@pytest.fixture(autouse=True)
def _measurements_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is small here, and no figure need be exact."""
    monkeypatch.setattr(memory, "LIMIT", 120.0)
    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(command, "bandwidth", partial(timing.bandwidth, numbers=1 << 16))


def test_fundus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = Architecture(width=2, size=64, source="centre_a", auxiliary_heads=False)
    model = ResUNet34(width=2)
    save_source_model(tmp_path / "centre_a.pt", architecture, model.state_dict())
    arguments = ["fundus", "--data-root", "synthetic", "--models", str(tmp_path)]
    arguments += ["--sources", "centre_a", "--size", "64", "--width", "2", "--images", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "centre_a.json").read_text())
    rows = record["results"]
    assert len(rows) == 4 * len(STRATEGIES)
    by_name = {(row["target"], row["strategy"]): row for row in rows}
    for (target, _), row in by_name.items():
        assert row["n"] == 2
        assert row["mean"] == pytest.approx((row["disc"] + row["cup"]) / 2)
        plain = by_name[target, "No Adapt"]
        assert row["difference"] == pytest.approx(row["mean"] - plain["mean"])
    table = (tmp_path / "out" / "fundus.md").read_text()
    assert table in capsys.readouterr().out
    average = sum(row["mean"] for row in rows if row["strategy"] == "PTBN") / 4
    assert f"| PTBN | test | - | {average:.2f} |" in table

    missing = [*arguments[:4], str(tmp_path / "nowhere"), *arguments[5:]]
    assert main([*missing, "--out", str(tmp_path / "other")]) == 2
    assert "there is no source model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_pooled_interval_resamples_within_groups() -> None:
    assert pooled_interval([[1.0] * 5, [3.0] * 9], seed=0) == (2.0, 2.0)
    assert pooled_interval([[1.0], [3.0] * 9], seed=0) is None
    low, high = pooled_interval([[0.0, 1.0] * 50], seed=0)
    assert 0.38 < low < 0.44  # 0.5 ± 1.96·0.05
    assert 0.56 < high < 0.62


CPU = torch.device("cpu")
SMALL = [
    *("--width", "4", "--resunet-cases", "2x32", "--goal-cases", ""),
    *("--transformer-cases", "2x4", "--transformer-width", "16", "--transformer-layers", "2"),
    *(
        "--objectives",
        "2,3",
        "--rounds",
        "2",
        "--peer-rounds",
        "1",
        "--seconds",
        "0",
        "--overhead-pairs",
        "4",
    ),
    *("--memory-width", "64", "--threads", "1"),
]


def _comparison(**steps: Callable[[], object]) -> Comparison:
    makers = {name: lambda step=step: step for name, step in steps.items()}
    floor, peer = makers.pop(FLOOR), makers.pop("peer", None)
    return Comparison(
        method="method",
        passes="none",
        floor=floor,
        ours=makers,
        peers={} if peer is None else {"peer": peer},
        traffic=Traffic((), 0),
    )


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--parts", "pcgrad,sam,grata,gs_ema,gated_ema,overhead"]
    assert main(["speed", *SMALL, *parts, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    text = (tmp_path / "speed.md").read_text()
    assert text in capsys.readouterr().out
    assert record["command"] in text
    for word in SMALL:
        assert word in record["command"]
    rows = record["rows"]
    timed = [row for row in rows if row["measure"] == RATIO]
    networks = list(record["networks"])
    by_network = {
        network: {row["method"] for row in timed if row["network"] == network}
        for network in networks
    }
    methods = {"PCGrad, K = 2", "PCGrad, K = 3", "SAM", "GS-EMA", "GatedEMA's update"}
    methods |= {"cosine of signs"}
    assert by_network == {networks[0]: methods | {"GraTa's step"}, networks[1]: methods}
    for row in timed:
        peers = ("TorchJD", "pytorch-optimizer", "torch ", BATCHED, MEAN_TEACHER)
        peer = row["variant"].startswith(peers)
        assert row["rounds"] == (1 if peer else 2)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["excess_low"] <= row["excess"] <= row["excess_high"]
        if row["variant"] == FLOOR:
            assert row["milliseconds"] > 0
            assert row["value"] == 1
    for network in networks:
        for method in by_network[network]:
            variants = {
                row["variant"].partition(" ")[0]
                for row in timed
                if (row["network"], row["method"]) == (network, method)
            }
            peers = {"TorchJD", "pytorch-optimizer", "the"} if "PCGrad" in method else set()
            peers |= {"pytorch-optimizer"} if method == "SAM" else set()
            assert {FLOOR, "gradkit,"} | peers <= variants
    assert {row["method"] for row in rows if row["measure"] == overhead.OVERHEAD} == {
        *overhead.KINDS
    }
    (floor,) = (
        floor
        for floor in record["floors"]
        if floor["network"] == networks[0] and floor["method"] == "PCGrad, K = 3"
    )
    assert floor["numbers"] == record["networks"][networks[0]]
    assert (floor["reads"], floor["writes"]) == (9, 4)
    rate = float(record["machine"]["bandwidth"].partition(" ")[0])
    expected = 13 * 4 * floor["numbers"] / rate / 1e6
    assert floor["milliseconds"] == pytest.approx(expected, rel=0.02)
    # Goals are about the published network: of this one's rows, only the overhead has any.
    assert {goal["measure"] for goal in record["goals"]} == {overhead.OVERHEAD}
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--resunet-cases", "64", "is not BATCHxSIZE"),
        ("--tta-cases", "8", "--tta-cases: the case '8' is not BATCHxSIZE"),
        ("--objectives", "1,2", "give numbers from 2 on"),
        ("--parts", "pcgrad,speed", "unknown name 'speed'"),
        ("--rounds", "0", "--rounds is 0; choose at least 1"),
        ("--overhead-pairs", "0", "--overhead-pairs is 0; choose at least 1"),
        ("--threads", "0", "--threads is 0; choose at least 1"),
        ("--width", "3", "--width is 3; choose an even number"),
        ("--transformer-width", "20", "--transformer-width is 20; choose a multiple of its 8"),
        ("--seconds", "nan", "--seconds is nan; choose a number of at least 0"),
    ],
)
def test_speed_refuses(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", *SMALL, option, value, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_step_that_takes_longer_has_that_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def taking(seconds: float) -> Step:
        def step() -> None:
            nonlocal now
            now += seconds

        return step

    monkeypatch.setattr("benchmarks.speed.timing.perf_counter", lambda: now)
    comparison = _comparison(floor=taking(0.01), other=taking(0.03), peer=taking(0.5))
    times = time_in_turn(comparison, Clock(CPU), Rounds(5, 5, seconds=0))
    summary = summarise(times, seed=0)
    assert summary["other"]["value"] == pytest.approx(3)
    assert summary["other"]["excess"] == pytest.approx(20)
    assert summary["peer"]["value"] == pytest.approx(50)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine becomes slower by each round; within one, the other takes twice as long.
    times = {FLOOR: [1.0 + n for n in range(5)], "other": [2.0 + 2 * n for n in range(5)]}
    summary = summarise(times, seed=0)["other"]
    assert (summary["value"], summary["low"], summary["high"]) == (2, 2, 2)
    assert (summary["milliseconds"], summary["excess"]) == (6000, 3000)
    # The ratio of the medians would be 1 here, their difference 0.
    summary = summarise({FLOOR: [1.0, 10.0, 4.0], "other": [4.0, 20.0, 4.0]}, seed=0)["other"]
    assert (summary["value"], summary["excess"]) == (2, 3000)


def test_order_rotates_and_peers_stop_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Log(Clock):
        def time(self, step: Callable[[], object]) -> float:
            step()
            return 1.0 + len(calls)

    steps = {name: lambda name=name: calls.append(name) for name in (FLOOR, "ours", "peer")}
    ticks = iter([0.0, 5.0, 20.0])  # asked at the start and once two rounds are over
    monkeypatch.setattr("benchmarks.speed.timing.perf_counter", lambda: next(ticks))
    times = time_in_turn(_comparison(**steps), Log(CPU), Rounds(2, 2, seconds=10))
    assert calls == [FLOOR, "ours", "peer", "ours", "peer", FLOOR, FLOOR, "ours"]
    assert {name: len(values) for name, values in times.items()} == {
        FLOOR: 3, "ours": 3, "peer": 2,
    }  # fmt: skip


def test_peers_that_take_no_part_are_not_made() -> None:
    def refuse() -> Step:
        raise AssertionError("it was made")

    comparison = dataclasses.replace(
        _comparison(floor=lambda: None, ours=lambda: None, peer=lambda: None),
        peers={"peer": refuse},
    )
    times = time_in_turn(comparison, Clock(CPU), Rounds(1, 0, seconds=0))
    assert times.keys() == {FLOOR, "ours"}


def test_what_a_method_adds_is_a_difference_within_rounds() -> None:
    comparison = Comparison(
        method="method",
        passes="none",
        floor=lambda: lambda: 1.0,
        ours={"ours": lambda: lambda: 5.0},
        without={"ours": lambda: lambda: 3.0},
        peers={},
        traffic=Traffic((), 0),
    )

    class Told(Clock):
        def time(self, step: Callable[[], Any]) -> float:
            return float(step())

    times = time_in_turn(comparison, Told(CPU), Rounds(3, 3, seconds=0))
    assert times == {FLOOR: [1.0] * 3, "ours": [2.0] * 3}


def test_interval_of_the_median() -> None:
    values = torch.randn(101, generator=torch.Generator().manual_seed(0)).tolist()
    assert median_interval(values, seed=3) == median_interval(values, seed=3)
    assert median_interval(values, seed=3) != median_interval(values, seed=4)
    low, high = median_interval(values, seed=0)
    ordered = sorted(values)
    # The ranks of the binomial interval of the median of 101 values are 41 and 61.
    assert ordered[36] < low < ordered[44]
    assert ordered[56] < high < ordered[64]


def test_goals() -> None:
    goals = (
        Goal(RATIO, "net", "2x64", "SAM", 1.10),
        Goal(memory.MEMORY, None, None, "PCGrad, K = 4", 5),
    )
    row = {"measure": RATIO, "network": "net", "case": "2x64", "method": "SAM"}
    meets = {**row, "variant": gradkit_name("inplace"), "value": 1.1, "low": 1.0, "high": 1.3}
    reaches = {**meets, "value": 1.2, "low": 1.1}
    misses = {**row, "variant": gradkit_name("functional"), "value": 1.3, "low": 1.2, "high": 1.5}
    others = [
        {**misses, "variant": "pytorch-optimizer"},
        {**misses, "case": "4x128"},
        {**misses, "network": "net, width 8"},
        {**misses, "method": "GraTa"},
    ]
    measured = {"value": 5.2, "low": 5.15, "high": 5.25}
    most = {
        "measure": memory.MEMORY,
        "network": "any",
        "case": "any",
        "method": "PCGrad, K = 4",
        "variant": gradkit_name("inplace"),
        **measured,
    }
    judged = judge([meets, reaches, misses, *others, most], goals)
    assert [(one["variant"], one["outcome"]) for one in judged] == [
        ("gradkit, inplace", "met"),
        ("gradkit, inplace", "open"),
        ("gradkit, functional", "missed"),
        ("gradkit, inplace", "missed"),
    ]
    assert [verdict(one) for one in judged] == [
        "met",
        "open: 0.10 above, within the interval",
        "missed by 0.20 [0.10, 0.40]",
        "missed by 0.20 [0.15, 0.25]",
    ]


def test_committed_verdicts_are_those_of_their_numbers() -> None:
    """No median above its goal is called met, and the tables say what the numbers say."""
    results = (ROOT / "benchmarks/results").glob("speed*.json")
    records = {path: json.loads(path.read_text()) for path in results}
    outcomes: Counter[str] = Counter()
    for path, record in records.items():
        for goal in record["goals"]:
            assert goal["outcome"] == outcome(goal, goal["limit"])
            outcomes[goal["outcome"]] += 1
        counted = Counter(goal["outcome"] for goal in record["goals"])
        text = report(record)
        assert text == path.with_suffix(".md").read_text(), path.name
        if record["goals"]:
            assert f"Met: {counted['met']} of {len(record['goals'])};" in text
            assert f"Open: {counted['open']};" in text
            assert f"Missed: {counted['missed']};" in text
    assert outcomes.keys() == {"met", "open", "missed"}


def test_traffic() -> None:
    traffic = Traffic((("rows", 4, 4), ("Gram", 4, 0)), numbers=1_000_000)
    assert (traffic.reads, traffic.writes) == (8, 4)
    assert traffic.milliseconds(gigabytes_per_second=48) == pytest.approx(1)


def test_floors_do_the_passes_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forward and backward passes in the floor as in gradkit's step."""
    problems = (resunet("2x32", 4, CPU), transformer("2x4", 16, 2, CPU), wide_mlp(8, CPU))
    counts = {"forward": 0, "backward": 0}
    for problem in problems:
        images = problem.x.dim() == 4
        for comparison in (
            pcgrad(problem, 3),
            sam(problem),
            gs_ema(problem),
            *([grata(problem)] if images else []),
        ):
            seen = {}
            for name, make in {FLOOR: comparison.floor, **comparison.ours}.items():
                with monkeypatch.context() as patch:
                    _count(patch, counts, type(problem.model()))
                    step = make()
                    step()
                    counts.update(forward=0, backward=0)
                    step()
                seen[name] = dict(counts)
            assert all(count == seen[FLOOR] for count in seen.values()), comparison.method
            forward, backward = seen[FLOOR].values()
            assert comparison.passes.startswith(f"{forward} forward, {backward} backward")
    assert gated_ema(problems[0]).traffic.reads == 2


def _count(patch: pytest.MonkeyPatch, counts: dict[str, int], network: type) -> None:
    forward, grad, backward = network.forward, torch.autograd.grad, torch.autograd.backward

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[kind] += 1
            return function(*arguments, **named)

        return call

    patch.setattr(network, "forward", counted("forward", forward))
    patch.setattr(torch.autograd, "grad", counted("backward", grad))
    patch.setattr(torch.autograd, "backward", counted("backward", backward))


def test_memory_of_known_size() -> None:
    rows = memory.measure_memory([], with_sam=False, width=1024, device=CPU, threads=1)
    assert [row["variant"] for row in rows] == [CONTROL]
    assert rows[0]["value"] == pytest.approx(3, abs=0.25)
    surgery = {"objectives": 2, "variant": gradkit_name("functional"), "width": 512}
    # Two rows and the direction, in place of one gradient: no objective's is held as a whole beside
    # its row. One layer's is, a quarter of all, and what is not told apart.
    value = memory.measure_one({**surgery, "device": "cpu"})["value"]
    assert 1.75 < value < 2.75


def test_memory_reports_what_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 1e-6)
    request = {"objectives": 2, "variant": CONTROL, "width": 8, "device": "cpu"}
    with pytest.raises(RuntimeError, match=rf"(?s)measuring {CONTROL} failed.*Timeout"):
        memory.measure_one(request)


def test_plot_leaves_out_what_a_logarithm_cannot_show(tmp_path: Path) -> None:
    row = {"measure": RATIO, "network": "net", "case": "1x1", "method": "SAM"}
    good = {**row, "variant": gradkit_name("inplace"), "value": 1.2, "low": 1.1, "high": 1.3}
    bad = {**good, "method": "GatedEMA's update", "low": -0.5}
    plot({"rows": [good, bad], "networks": {"net": 1000}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
