"""The complete example in the documentation runs under torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from children import ROOT, run_python

from processes.ranks import SHARDS_ON_CPU

pytestmark = pytest.mark.distributed

PAGE = ROOT / "docs" / "distributed.md"


@pytest.mark.parametrize("options", [[], ["--sharded"]])
def test_the_documented_example_runs_alike_on_both_ranks(
    options: list[str], tmp_path: Path
) -> None:
    if options and not SHARDS_ON_CPU:
        pytest.skip("fully_shard of this version of torch needs an accelerator")
    (script,) = re.findall(r"^~~~python\n(.*?)^~~~", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = run_python(
        *torchrun,
        "train.py",
        *options,
        cwd=tmp_path,
        limit=180,
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    assert run.returncode == 0, run.stderr
    # The lines of two processes may run into each other.
    report = r"rank (\d): (loss \d+\.\d{6}, cosine [+-]\d\.\d{6}, gate [01])"
    reports = dict(re.findall(report, run.stdout))
    assert reports.keys() == {"0", "1"}, run.stdout + run.stderr
    assert reports["0"] == reports["1"]
    assert (tmp_path / "checkpoint" / ".metadata").exists()
