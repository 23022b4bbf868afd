"""A program or a rank that hangs is an error that shows where, and leaves no process behind."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from children import ROOT, HungError, run_python
from processes.ranks import FailedRankError, on_ranks

import gradkit

# A program whose child hangs, in a session of its own and holding the program's output.
HANGS = """
import subprocess, sys, time
def sleeping_child():
    open(sys.argv[1], "w").write(str(CHILD.pid))
    CHILD.wait()
print("working", flush=True)
code = "import time\\ndef asleep(): time.sleep(600)\\nasleep()"
CHILD = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
sleeping_child()
"""


def test_a_program_that_hangs_shows_the_stacks_of_all_its_processes(tmp_path: Path) -> None:
    with pytest.raises(HungError, match="still running after 2 s") as caught:
        run_python("-S", "-c", HANGS, tmp_path / "pid", limit=2)
    message = str(caught.value)
    for word in ("working", "in sleeping_child", "in asleep"):
        assert word in message
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_programs_output_and_status_come_back() -> None:
    done = run_python("-S", "-c", "import sys; print('é'); sys.exit('no')")
    assert (done.stdout, done.stderr, done.returncode) == ("é\n", "no\n", 1)


def test_programs_anywhere_import_this_copy(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('gradkit').origin)"
    assert run_python("-c", code, cwd=tmp_path).stdout.strip() == gradkit.__file__
    assert Path(gradkit.__file__).is_relative_to(ROOT)


def hang(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        time.sleep(600)


def kill(rank: int) -> None:
    import os

    import torch.distributed as dist

    if dist.get_rank() == rank:
        os.abort()


@pytest.mark.distributed
def test_a_rank_that_hangs_shows_its_stacks() -> None:
    with pytest.raises(FailedRankError, match=r"(?s)rank 1 hung.*in hang"):
        on_ranks(2, hang, 1, limit=2)


@pytest.mark.distributed
def test_a_rank_that_crashes_shows_its_stacks() -> None:
    with pytest.raises(FailedRankError, match=r"(?s)rank 0 .*exit code -6.*in kill"):
        on_ranks(2, kill, 0)
