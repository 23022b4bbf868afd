"""Progress off a terminal: whole lines, not too many of them; on one, a bar."""

import io
import sys

import pytest
import torch

from examples.common.adaptation import adapt_online
from examples.common.datasets import Sample
from examples.common.progress import Progress
from examples.fundus.network import ResUNet34
from examples.fundus.sample import DICE
from examples.fundus.source_model import Architecture
from examples.fundus.training import TrainingSettings, train_source
from gradkit import tta


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def run(total, seconds, notes="", **options):
    clock = Clock()
    with Progress(total, "work", "run", clock=clock, **options) as progress:
        for _ in range(total - options.get("initial", 0)):
            clock.now += seconds
            progress.update(notes)


def test_a_line_every_ten_seconds_and_one_at_the_end(capsys):
    run(25, seconds=1)
    assert capsys.readouterr().err.split("\n") == [
        "work: run 10 of 25, 0:10 so far, about 0:15 left",
        "work: run 20 of 25, 0:20 so far, about 0:05 left",
        "work: run 25 of 25, 0:25 so far",
        "",
    ]


def test_the_interval_between_lines_can_be_chosen(capsys):
    run(25, seconds=5, interval=60.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "work: run 12 of 25",
        "work: run 24 of 25",
        "work: run 25 of 25",
    ]


def test_no_more_lines_than_rounds(capsys):
    run(3, seconds=4000, notes="loss=1")
    assert capsys.readouterr().err.split("\n") == [
        "work: run 1 of 3, loss=1, 1:06:40 so far, about 2:13:20 left",
        "work: run 2 of 3, loss=1, 2:13:20 so far, about 1:06:40 left",
        "work: run 3 of 3, loss=1, 3:20:00 so far",
        "",
    ]


def test_a_line_for_every_round_and_time_of_those_done_here(capsys):
    run(5, seconds=2, every_round=True, initial=3)
    assert capsys.readouterr().err.split("\n") == [
        "work: run 4 of 5, 0:02 so far, about 0:02 left",
        "work: run 5 of 5, 0:04 so far",
        "",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(3, seconds=1, notes="loss=1", every_round=True)
    text = terminal.getvalue()
    assert "\r" in text
    assert "3/3" in text
    assert "loss=1" in text
    assert "so far" not in text
    assert text.endswith("\n")


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_without_a_description(monkeypatch, stream):
    output = stream()
    monkeypatch.setattr(sys, "stderr", output)
    with Progress(1, None, "run") as progress:
        progress.update()
    assert output.getvalue() == ""


def test_an_error_ends_the_bar_before_anything_else_is_printed(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def interrupted():
        with Progress(2, "work", "run") as progress:
            progress.update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.getvalue().endswith("\n")


def test_training_and_adaptation_write_lines(capsys, tmp_path):
    settings = TrainingSettings(epochs=1, batch_size=2)
    samples = [Sample(name, torch.rand(3, 64, 64), torch.ones(2, 64, 64)) for name in "ab"]
    cpu = torch.device("cpu")
    train_source(samples, Architecture(2, 64, "here"), settings, tmp_path, cpu)
    adapt_online(tta.NoAdapt(ResUNet34(2)), samples, cpu, DICE, description="there, none")
    first, second, nothing = capsys.readouterr().err.split("\n")
    assert first.startswith("train here: epoch 1 of 1, loss=")
    assert second.startswith("there, none: image 2 of 2, ")
    assert nothing == ""
    assert "\r" not in first + second
