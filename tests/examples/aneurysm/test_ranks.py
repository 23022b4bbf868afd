"""Two processes that train together: they agree, and step along the mean of their gradients."""

import pytest
import torch
from children import run_python

from examples.aneurysm.losses import dice_ce
from examples.aneurysm.networks import build_network
from examples.aneurysm.ranks import gathered, rank, ranks
from examples.common.checkpoint import load

pytestmark = pytest.mark.distributed

SCRIPT = """
import sys
from pathlib import Path

import torch

from examples.aneurysm.__main__ import main
from examples.aneurysm.data import open_centre
from examples.aneurysm.ranks import gathered, joined_ranks, rank
from examples.aneurysm.settings import TrainingSettings
from examples.aneurysm.training import make_training
from examples.common.training import train

out = Path(sys.argv[1])
device = torch.device("cpu")
settings = TrainingSettings("gsema", epochs=1, interval=1, width=2, patch=16, learning_rate=0.01)
centres = {n: open_centre("synthetic", n, 16, length=2) for n in ("centre_a", "centre_b")}
with joined_ranks(device):
    folder = out / f"run{rank()}"
    fitted = make_training(centres, "centre_d", 16, settings, folder, device, "synthetic")
    training = fitted.training
    start = {name: value.clone() for name, value in training.model.state_dict().items()}
    train(training, folder, writes=rank() == 0)
    torch.save(
        {
            "start": start,
            "grads": {n: p.grad for n, p in training.model.named_parameters()},
            "model": training.model.state_dict(),
            "teacher": fitted.method.teacher.state_dict(),
            "history": training.history,
            "batch": next(iter(training.batches(0))),
            "gathered": gathered([rank(), rank() + 2] if rank() == 0 else [1], 3),
        },
        out / f"rank{rank()}.pt",
    )
    words = "--volumes 2 --size 16 --patch 16 --width 2 --iterations 1 --validations 1"
    assert main(["train", *words.split(), "--out", str(out / "command")]) == 0
"""


def test_two_ranks(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    run = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path,
        GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second = (load(tmp_path / f"rank{k}.pt") for k in range(2))
    for part in ("model", "teacher", "grads"):
        for name in first[part]:
            assert torch.equal(first[part][name], second[part][name]), name
    assert first["gathered"] == second["gathered"] == [0, 1, 2]
    scores = [{k: e[k] for k in ("dsc", "sen", "jac", "vs")} for e in first["history"]]
    assert scores == [{k: e[k] for k in ("dsc", "sen", "jac", "vs")} for e in second["history"]]
    assert (tmp_path / "run0" / "last.pt").exists()
    assert not (tmp_path / "run1" / "last.pt").exists()
    assert run.stdout.count("network of the best validation") == 1
    assert load(tmp_path / "command" / "last.pt")["settings"]["ranks"] == 2
    # Each rank draws its own patches; the step is along the mean of their gradients.
    assert not torch.equal(first["batch"]["source"], second["batch"]["source"])
    network = build_network("unet", 2)
    network.load_state_dict(first["start"])
    loss = sum(
        0.25 * dice_ce(network(each["batch"][view]).logits, each["batch"]["label"])
        for each in (first, second)
        for view in ("source", "target")
    )
    (loss / 2).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(first["grads"][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_lone_process():
    assert (rank(), ranks()) == (0, 1)
    assert gathered([3, 1], 2) == [3, 1]
