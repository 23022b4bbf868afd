"""The complete example in the documentation runs under torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from children import ROOT, run_python

pytestmark = pytest.mark.distributed

PAGE = ROOT / "docs" / "distributed.md"
# Both ways in one start of torchrun: most of the time goes into starting its three processes.
BOTH = """
import contextlib, os, runpy, sys
for folder, options in (("replicated", []), ("sharded", ["--sharded"])):
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    sys.argv = ["train.py", *options]
    with open("rank" + os.environ["RANK"], "w") as out, contextlib.redirect_stdout(out):
        runpy.run_path("../train.py", run_name="__main__")
    os.chdir("..")
"""


def test_the_documented_example_runs_alike_on_both_ranks(tmp_path: Path) -> None:
    (script,) = re.findall(r"^~~~python\n(.*?)^~~~", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "both.py").write_text(BOTH)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = run_python(
        *torchrun,
        "both.py",
        cwd=tmp_path,
        limit=180,
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    assert run.returncode == 0, run.stderr
    report = r"rank (\d): (loss \d+\.\d{6}, cosine [+-]\d\.\d{6}, gate [01])\n"
    for folder in ("replicated", "sharded"):
        lines = [(tmp_path / folder / f"rank{rank}").read_text() for rank in range(2)]
        found = [re.fullmatch(report, line) for line in lines]
        assert all(found), lines
        (first, said), (second, same) = (match.groups() for match in found if match)
        assert (first, second, said) == ("0", "1", same)
        assert (tmp_path / folder / "checkpoint" / ".metadata").exists()
