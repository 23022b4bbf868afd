"""Methods for disc and cup: both fusions, what a source model's file tells for them, and PASS."""

import json

import pytest
import torch
from helpers import complaint_of

from examples.common.checkpoint import CheckpointError, load
from examples.fundus.__main__ import main
from examples.fundus.data import open_domain
from examples.fundus.fusion import describe, load_cup_ratio, require_cup_ratio
from examples.fundus.gate import CupGate, CupRatio, measure_cup_ratio
from examples.fundus.methods import BOTTLENECK, DECODER, build_adapter
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, save_source_model
from gradkit import tta

RATIO = CupRatio(0.3, 0.1)


def save(path, **details):
    torch.manual_seed(0)
    save_source_model(path, Architecture(2, 64, "centre_a"), ResUNet34(2).state_dict(), **details)
    return path


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 2, 1),
    ).eval()


def candidate(model, image, statistics):
    adapter = tta.PTBN(model, statistics=statistics)
    views = [v.inverse(adapter(v.forward(image)).sigmoid()) for v in tta.WEAK_VIEWS]
    return 0.5 * views[0] + 0.5 * sum(views) / 6


def test_both_fusions_predict_what_their_rule_says():
    model, image = network(), torch.rand(1, 3, 32, 32)
    first, second = (candidate(model, image, each) for each in ("source", tta.Mixed(0.2)))
    fused = build_adapter("fused", model)(image).sigmoid()
    torch.testing.assert_close(fused[:, 0], second[:, 0])
    torch.testing.assert_close(fused[:, 1], 0.6 * first[:, 1] + 0.4 * second[:, 1])
    w = CupGate(RATIO)(torch.stack([first, second]))[1, 0, 1]
    gated = build_adapter("gated", model, ratio=RATIO)(image).sigmoid()
    torch.testing.assert_close(gated[:, 0], second[:, 0])
    torch.testing.assert_close(gated[:, 1], (1 - w) * first[:, 1] + w * second[:, 1])
    with pytest.raises(ValueError, match="ratio of cup to disc"):
        build_adapter("gated", model)


def test_shape_prompts_are_behind_the_encoder_and_learn_from_the_decoder():
    torch.manual_seed(0)
    model, image = ResUNet34(2, auxiliary_heads=True), torch.rand(1, 3, 64, 64)
    adapter = build_adapter("pass-shapes", model)
    encoder = model.eval().encode(image)[-1]
    assert adapter.model.prompts.bank.shape == (encoder.shape[1], 16, 16)  # of 512 pixels
    adapter(image)
    assert adapter.model.prompts.bank.count_nonzero() > 0
    alone = tta.PASS(
        model.without_heads(), excluded=DECODER, prompted=BOTTLENECK, image_size=64, hidden=2
    )
    before = {name: each.clone() for name, each in alone.trained().items()}
    alone(image)
    moved = {name for name, each in alone.trained().items() if not torch.equal(each, before[name])}
    assert moved >= {"first.weight", "second.weight", "model.res.bn1.weight"}
    assert not [name for name in moved if name.startswith(("prompts.", "model.up", "model.bnout"))]


def test_files_tell_the_ratio_and_it_is_checked(tmp_path):
    path = save(tmp_path / "a.pt", **describe(RATIO))
    assert load_cup_ratio(path) == RATIO
    assert require_cup_ratio(path, None) == RATIO
    assert load_cup_ratio(save(path)) is None
    for wrong in (
        {"mean": 0.3},
        {"mean": "0.3", "deviation": 0.1},
        {"mean": 0.3, "deviation": float("nan")},
        [0.3, 0.1],
        "much",
    ):
        with pytest.raises(CheckpointError, match=r"ratio of cup to disc is .* train it again"):
            load_cup_ratio(save(path, cup_ratio=wrong))


def test_compare_runs_both_and_keeps_the_ratio(tmp_path):
    """From a file without it: from the train list."""
    path = save(tmp_path / "old.pt")
    words = ["compare", "--size", "64", "--width", "2", "--target-images", "2", "--train-images"]
    words += ["4", "--targets", "centre_b", "--methods", "none,ptbn,fused,gated", "--checkpoint"]
    assert main([*words, str(path), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["method"] for each in results] == ["none", "ptbn", "fused", "gated"]
    assert results[-1]["statistics"] == "source and mixed:0.2"
    assert results[-1]["lr"] is None
    expected = measure_cup_ratio(open_domain("synthetic", "centre_a", "train", 64, 0, 4))
    assert load_cup_ratio(tmp_path / "centre_a.pt") == expected
    assert load(tmp_path / "centre_a.pt")["cup_ratio"]["mean"] > 0


def test_adapt_takes_the_ratio_from_the_file_or_the_images(tmp_path, capsys):
    words = ["adapt", "--method", "gated", "--target-images", "2", "--out", str(tmp_path / "out")]
    told = save(tmp_path / "told.pt", **describe(RATIO))
    assert main([*words, "--checkpoint", str(told)]) == 0
    root = tmp_path / "images"
    export = ["export", "--domains", "centre_b", "--count", "4", "--size", "64", "--out"]
    assert main([*export, str(root)]) == 0
    old = save(tmp_path / "old.pt")
    capsys.readouterr()
    words += ["--data-root", str(root), "--checkpoint"]
    assert main([*words, str(told)]) == 0
    capsys.readouterr()
    message = complaint_of(capsys, main, *words, str(old))
    assert "does not tell the ratio of cup to disc" in message
    assert "give the source's images in --data-root, or train it again" in message


def test_labels_that_do_not_vary_stop_the_command_before_it_runs(tmp_path, capsys):
    path = save(tmp_path / "a.pt", **describe(CupRatio(0.3, 0.0)))
    words = ["adapt", "--method", "gated", "--checkpoint", str(path), "--out", str(tmp_path / "o")]
    assert "0.3 in all of its labels" in complaint_of(capsys, main, *words)
    assert not (tmp_path / "o").exists()
