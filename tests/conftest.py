"""What tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from checked import begin_test, check_quickly
from children import ROOT

check_quickly()  # before anything imports the package, whose functions are decorated then

# Programs and ranks that tests start import this copy of the package, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_collection_finish() -> None:
    """What is there before the first test is not searched in each garbage collection."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Each test's first calls are checked."""
    begin_test()


@pytest.fixture(autouse=True, scope="session")
def _a_few_numbers_are_many() -> Iterator[None]:
    """Tests' networks are small, and are to take the way of large parameters, too."""
    from gradkit.core import flat

    before, flat.LARGE = flat.LARGE, 4
    yield
    flat.LARGE = before


@pytest.fixture(autouse=True, scope="session")
def _seeding_keeps_no_stacks() -> Iterator[None]:
    """For each kind of accelerator, torch notes the stack of a seed that waits for its start.

    That is most of the time of `torch.manual_seed`, which the tests call often.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if hasattr(kind, "traceback"):
                patch.setattr(kind, "traceback", SimpleNamespace(format_stack=list))
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handling of Ctrl-C, which a shell's background jobs inherit switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
