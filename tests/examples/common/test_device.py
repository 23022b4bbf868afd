import pytest
import torch

from examples.common.device import choose_device


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="'abacus' is not available; pass auto, cpu or cuda"):
        choose_device("abacus")
