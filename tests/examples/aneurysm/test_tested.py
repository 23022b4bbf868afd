"""Scores are kept with a training, and made again where they would be of something else."""

from dataclasses import asdict, replace

import pytest
import torch

from examples.aneurysm import tested
from examples.aneurysm.inference import score_volumes
from examples.aneurysm.synthetic import SyntheticAngiograms
from examples.aneurysm.tested import TESTED, score_network
from examples.aneurysm.training import Architecture
from examples.common.checkpoint import save_atomically

CPU = torch.device("cpu")
ARCHITECTURE = Architecture("unet", 2, False, 16, 16, "centre_d", False)


@pytest.fixture
def volumes():
    samples = SyntheticAngiograms("centre_d", 3, 16, 0)
    return [samples[index] for index in range(3)]


def keep_network(directory, seed):
    torch.manual_seed(seed)
    network = ARCHITECTURE.build().eval()
    best = directory / "best.pt"
    content = {"format": "aneurysm", "architecture": asdict(ARCHITECTURE)}
    save_atomically({**content, "model": network.state_dict()}, best)
    return best, network


def test_scores_are_kept_and_read_again(volumes, tmp_path, monkeypatch):
    best, network = keep_network(tmp_path, 0)
    cases, labels = score_volumes(network, volumes, 16, CPU)
    first = score_network(best, volumes, CPU)
    monkeypatch.setattr(tested, "score_volumes", None)
    again = score_network(best, volumes, CPU)
    for found in (first, again):
        assert found.cases == cases
        assert len(found.labels) == 2
        for label, expected in zip(found.labels, labels, strict=False):
            assert torch.equal(label.long(), expected.long())


def other_network(best, volumes):
    keep_network(best.parent, 1)
    return volumes


def fewer_volumes(best, volumes):
    return volumes[:2]


def corrected_target(best, volumes):
    return [replace(volumes[0], target=volumes[0].target.roll(3, dims=1)), *volumes[1:]]


def damaged(best, volumes):
    best.with_name(TESTED).write_bytes(b"no checkpoint")
    return volumes


@pytest.mark.parametrize("change", [other_network, fewer_volumes, corrected_target, damaged])
def test_what_has_changed_is_scored_again(change, volumes, tmp_path, monkeypatch):
    best, _ = keep_network(tmp_path, 0)
    score_network(best, volumes, CPU)
    changed = change(best, volumes)
    scored = []

    def counted(*arguments):
        scored.append(arguments)
        return score_volumes(*arguments)

    monkeypatch.setattr(tested, "score_volumes", counted)
    found = score_network(best, changed, CPU)
    assert len(scored) == 1
    assert len(found.cases) == len(changed)
    assert score_network(best, changed, CPU).cases == found.cases
    assert len(scored) == 1
