"""Warnings name the user's line."""

from pathlib import Path

from children import run_python

SCRIPT = """
import torch, warnings, gradkit as gk

warnings.simplefilter("always")
weights = torch.nn.Parameter(torch.ones(2))


def train(scheduled):
    base = torch.optim.SGD([weights], lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad())
    if scheduled:  # which wraps step()
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(lambda: weights.sum())  # here


train(scheduled=False)
train(scheduled=True)
"""


def test_a_warning_of_a_step_names_the_line_that_called_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    (line,) = (n for n, text in enumerate(SCRIPT.split("\n"), 1) if "# here" in text)
    done = run_python(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"train.py:{line}: UserWarning: PCGrad(") == 2
