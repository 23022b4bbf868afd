"""The benchmarks run, and their figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.fundus import STRATEGIES, pooled_interval
from benchmarks.speed import _median_ranks, _ratios
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, save_source_model


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
    low, high = pooled_interval([[0.0, 1.0] * 50], seed=0)
    assert 0.38 < low < 0.44  # 0.5 ± 1.96·0.05
    assert 0.56 < high < 0.62


def test_ratios_are_taken_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([value for n in range(5) for value in (0.0, 1.0 + n, 0.0, 2.0 + 2 * n)])
    monkeypatch.setattr("benchmarks.speed.perf_counter", lambda: next(clock))
    ratios = _ratios({"floor": lambda: None, "other": lambda: None}, rounds=5)
    assert ratios["other"] == {"milliseconds": 6000.0, "ratio": 2.0, "low": 2.0, "high": 2.0}


def test_ranks_of_the_median_interval() -> None:
    # The classical table: with 9 values, the 2nd and the 8th; with 15, the 4th and the 12th.
    assert _median_ranks(9) == (1, 7)
    assert _median_ranks(15) == (3, 11)
