"""Choice of the device that a trainer runs on."""

import torch

from examples.common.suggestions import did_you_mean


def choose_device(name: str = "auto") -> torch.device:
    """The named device, or the best one present for `auto`: CUDA, else the CPU.

    Raises:
        ValueError: the name is not a device's, or that device is not present.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        guess = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise ValueError(
            f"device {name!r} is not available; pass auto, cpu or cuda"
            f"{'' if name.startswith('cuda') else guess}"
        ) from error
    return device
