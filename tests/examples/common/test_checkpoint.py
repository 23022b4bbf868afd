"""Checkpoint files are complete or absent."""

import pytest
import torch

from examples.common.checkpoint import load, save_atomically


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    save_atomically({"value": 1}, path)

    def fail(content, file):
        file.write(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        save_atomically({"value": 2}, path)
    monkeypatch.undo()
    assert load(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_replaced_not_overwritten(tmp_path):
    path, old = tmp_path / "m.pt", tmp_path / "old.pt"
    save_atomically({"value": 1}, path)
    old.hardlink_to(path)
    save_atomically({"value": 2}, path)
    assert load(path) == {"value": 2}
    assert load(old) == {"value": 1}
