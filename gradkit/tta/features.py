"""The features that a model's classifier reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_CLASSIFIERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def classifier_of(model: nn.Module, name: str | None = None) -> nn.Module:
    """A module by its name; without one, the last linear or convolutional layer, as registered.

    Raises:
        ValueError: If there is no such module.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> classifier_of(model)
        Conv2d(8, 2, kernel_size=(1, 1), stride=(1, 1))
        >>> classifier_of(model, "1")
        ReLU()
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise ValueError(
                f"the model has no module {name!r}; its modules are "
                f"{', '.join(repr(each) for each in modules if each)}"
            )
        return modules[name]
    found = [each for each in modules.values() if isinstance(each, _CLASSIFIERS)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear or convolutional layer that could be its "
            "classifier; pass classifier= the name of a module"
        )
    return found[-1]


@contextmanager
def captured_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """A context that records the first input of each call of a module.

    Raises:
        ValueError: If the module was not called, as that of an auxiliary head is not.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> with captured_inputs(layer) as seen:
        ...     _ = layer(torch.ones(1, 2))
        >>> seen
        [tensor([[1., 1.]])]
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            f"the forward pass does not call {module}, which was taken for the classifier; pass "
            "the name of the module whose features count: classifier= of DIGA, features= of DLTTA"
        )
