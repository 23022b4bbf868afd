"""What is written is what TensorBoard reads."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.common.tensorboard import ScalarWriter


def test_numbers_are_read_back_and_runs_are_joined(tmp_path):
    for run, step in enumerate((300, 2**40)):
        with ScalarWriter(tmp_path / "new") as writer:
            writer.add({"loss": 0.5 - run, "dice_ä": 75.25 + run}, step)
    assert len(list((tmp_path / "new").iterdir())) == 2
    read = EventAccumulator(str(tmp_path / "new")).Reload()
    assert read.Tags()["scalars"] == ["loss", "dice_ä"]
    for tag, values in (("loss", [0.5, -0.5]), ("dice_ä", [75.25, 76.25])):
        # Files of one second are read in the order of their names, in which 10 is before 9.
        found = sorted((event.step, event.value) for event in read.Scalars(tag))
        assert found == [(300, pytest.approx(values[0])), (2**40, pytest.approx(values[1]))]
