"""Scalars for TensorBoard, through a writer that stands in for the package's."""

import sys
from types import ModuleType

import pytest

from examples.common.board import Board
from examples.common.usage import UsageError


def test_losses_and_scores_are_written_by_epoch(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, directory):
            written.append(directory)

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            written.append("flushed")

        def close(self):
            written.append("closed")

    package = ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    with Board(tmp_path) as board:
        board.write({"epoch": 2.0, "loss": 0.5, "dsc": 80.0})
    expected = [str(tmp_path), ("loss", 0.5, 2), ("dsc", 80.0, 2), "flushed", "closed"]
    assert written == expected


def test_without_the_package_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="install it"):
        Board(tmp_path)
