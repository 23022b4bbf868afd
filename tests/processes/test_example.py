"""The complete example in the documentation runs under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.mark.parametrize("options", [[], ["--sharded"]])
def test_the_documented_example_runs_alike_on_both_ranks(
    options: list[str], tmp_path: Path
) -> None:
    (script,) = re.findall(r"^~~~python\n(.*?)^~~~", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "train.py", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    # The lines of two processes may run into each other.
    report = r"rank (\d): (loss \d+\.\d{6}, cosine [+-]\d\.\d{6}, gate [01])"
    reports = dict(re.findall(report, run.stdout))
    assert reports.keys() == {"0", "1"}, run.stdout + run.stderr
    assert reports["0"] == reports["1"]
    assert (tmp_path / "checkpoint" / ".metadata").exists()
