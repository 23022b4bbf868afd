"""Choice of the device that a trainer runs on."""

import torch


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
        raise ValueError(f"device {name!r} is not available; pass auto, cpu or cuda") from error
    return device
