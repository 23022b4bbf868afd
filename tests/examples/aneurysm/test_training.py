"""Training: resumed with the same bits, selected on held-in cases, the same for any workers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from contents import assert_equal_content

from examples.aneurysm import training as module
from examples.aneurysm.data import open_centre
from examples.aneurysm.settings import TrainingSettings, schedule_factor
from examples.aneurysm.training import fit, load_network, make_training
from examples.common.checkpoint import CheckpointError, load, save_atomically
from examples.common.datasets import split_held_out
from examples.common.scores import CaseScores
from examples.common.training import TrainingError

CPU = torch.device("cpu")
SIZE = 16
TINY = TrainingSettings(
    epochs=2, interval=2, width=2, patch=16, batch_size=2, learning_rate=1e-2, schedule="polynomial"
)


@pytest.fixture(scope="module")
def centres():
    return {
        name: open_centre("synthetic", name, SIZE, length=3) for name in ("centre_a", "centre_b")
    }


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Scores by the network's own mean logit, so that validation takes no windows."""

    def score(model, samples, window, device, mirror, amp, cases):
        with torch.no_grad():
            values = [float(model(samples[k].image[None]).logits[:, 2].mean()) for k in cases]
        names = ("dsc", "sen", "jac", "vs")
        scored = [
            CaseScores(str(k), dict.fromkeys(names, v)) for k, v in zip(cases, values, strict=True)
        ]
        return scored, []

    monkeypatch.setattr(module, "score_volumes", score)


def run(centres, folder, settings=TINY, **options):
    return fit(centres, "centre_d", SIZE, settings, folder, CPU, "synthetic", **options)


class StoppedError(Exception):
    """Stands for an interruption."""


def stop(entry):
    raise StoppedError


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        *(("nnunet", "frozen"), ("feddg", "frozen"), ("ema", "frozen")),
        *(("bacl", "frozen"), ("bacl", "supervised")),
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(centres, tmp_path, method, teacher):
    settings = replace(TINY, method=method, teacher=teacher)
    whole = run(centres, tmp_path / "whole", settings)
    with pytest.raises(StoppedError):
        run(centres, tmp_path / "parts", settings, on_epoch=stop)
    torch.manual_seed(7)  # what else is drawn does not matter
    parts = run(centres, tmp_path / "parts", settings, resume=True)
    contents = [load(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    columns = [content["record"].pop("columns") for content in contents]
    assert_equal_content(*contents)
    assert_equal_content(load(whole.best), load(parts.best))
    # Objectives that had no part in a step have NaNs there.
    torch.testing.assert_close(*columns, rtol=0, atol=0, equal_nan=True)


def test_several_processes_refuse_to_train_a_teacher(centres, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ranks", lambda: 2)
    with pytest.raises(TrainingError, match="supervised and 2 processes train together"):
        run(centres, tmp_path, replace(TINY, teacher="supervised"))


def test_seeds_differ(centres, tmp_path):
    weights = [
        load(run(centres, tmp_path / str(seed), replace(TINY, seed=seed, epochs=1)).best)["model"]
        for seed in (0, 1)
    ]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_workers_do_not_change_the_patches(centres, tmp_path):
    batches = []
    for workers in (0, 1):
        settings = replace(TINY, workers=workers)
        fitted = make_training(centres, "centre_d", SIZE, settings, tmp_path, CPU, "synthetic")
        batches.append(list(fitted.training.batches(1)))
    assert_equal_content(*batches)


def test_every_epoch_has_patches_of_its_own(centres, tmp_path):
    training = make_training(centres, "centre_d", SIZE, TINY, tmp_path, CPU, "synthetic").training
    first, second, again = (list(training.batches(epoch)) for epoch in (0, 1, 0))
    assert_equal_content(first, again)
    assert not torch.equal(first[0]["source"], second[0]["source"])


def test_the_teacher_is_kept_and_validated(centres, tmp_path):
    fitted = run(centres, tmp_path, replace(TINY, method="gsema", epochs=1))
    student, teacher = fitted.training.model.state_dict(), fitted.method.teacher.state_dict()
    kept = load(fitted.best)["teacher"]
    assert_equal_content(dict(kept), dict(teacher))
    assert any(not torch.equal(kept[name], student[name]) for name in kept)
    assert len(fitted.record) == 2
    for name in ("cosine/source,target", "gate_cosine", "gate", "decay"):
        assert np.isfinite(fitted.record[name]).all()
    network, architecture = load_network(fitted.best)
    assert architecture.held_out == "centre_d"
    assert architecture.size == SIZE
    assert not network.training
    assert_equal_content(dict(network.state_dict()), dict(teacher))


def test_cases_that_validate_are_not_trained_on(centres, tmp_path):
    fitted = make_training(centres, "centre_d", SIZE, TINY, tmp_path, CPU, "synthetic")
    dataset = fitted.training.batches(0).dataset
    for subset, samples in zip(dataset.centres, centres.values(), strict=True):
        trained, held_in = split_held_out(len(samples), TINY.seed)
        assert list(subset.indices) == trained
        assert sorted(trained + held_in) == [0, 1, 2]
        assert len(held_in) == 1


def test_a_lone_volume_cannot_be_split():
    with pytest.raises(ValueError, match="1 volume"):
        split_held_out(1, 0, "volume")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 3}, "width 2, not 3"), ({"method": "ema"}, "method gsema, not ema")],
)
def test_other_settings_are_refused(centres, tmp_path, change, message):
    run(centres, tmp_path, replace(TINY, epochs=1, interval=1))
    with pytest.raises(CheckpointError, match=message):
        run(centres, tmp_path, replace(TINY, epochs=1, interval=1, **change), resume=True)


def test_other_data_are_refused(centres, tmp_path):
    settings = replace(TINY, epochs=1, interval=1)
    run(centres, tmp_path, settings)
    fewer = {name: torch.utils.data.Subset(data, [0, 1]) for name, data in centres.items()}
    with pytest.raises(TrainingError, match="other data"):
        run(fewer, tmp_path, settings, resume=True)


def test_networks_of_other_files_are_refused(centres, tmp_path):
    path = tmp_path / "a.pt"
    save_atomically({"model": {}}, path)
    with pytest.raises(CheckpointError, match="not a network of this example"):
        load_network(path)
    best = run(centres, tmp_path / "b", replace(TINY, epochs=1, interval=1)).best
    content = load(best)
    content["architecture"]["width"] = 4
    save_atomically(content, path)
    with pytest.raises(CheckpointError, match="cannot be restored"):
        load_network(path)


@pytest.mark.parametrize("method", ["none", "feddg"])
def test_half_precision_trains(centres, tmp_path, method):
    """By float16 on the CPU, with the scaler of the step."""
    settings = replace(TINY, method=method, amp=True, epochs=1)
    fitted = run(centres, tmp_path, settings)
    assert fitted.training.optimizer.scaler is not None
    entry = fitted.training.history[0]
    assert all(torch.tensor(value).isfinite() for value in entry.values())
    assert "scaler" in load(tmp_path / "last.pt")


def test_schedules():
    factors = [schedule_factor("steps", i, 20) for i in range(20)]
    assert factors[:2] == [1, 1]
    assert factors[2:4] == pytest.approx([0.1, 0.1])
    assert factors[4:] == pytest.approx(16 * [0.01])
    assert schedule_factor("constant", 5, 20) == 1
    assert schedule_factor("polynomial", 10, 20) == pytest.approx(0.5**0.9)
    assert schedule_factor("polynomial", 20, 20) == 0
