"""What adapting to one image costs: passes through the network, peak memory, time."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.fundus.network import Encoder

Result = TypeVar("Result")


class Passes:
    """Counts images that go through an encoder forwards and backwards, as a context.

    Hooks of all modules count for every `Encoder`, so that a teacher's passes and those of
    auxiliary heads count, too. A batch of six views is six images.

    Attributes:
        forwards: images forwarded so far.
        backwards: images through which gradients came back so far.
    """

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def __enter__(self) -> "Passes":
        self._handle = register_module_forward_hook(self._forward)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.remove()

    def _forward(self, module: nn.Module, inputs: Any, maps: Any) -> None:
        if not isinstance(module, Encoder):
            return
        deepest: Tensor = maps[-1]
        self.forwards += len(deepest)
        if deepest.requires_grad:
            deepest.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class PeakTensors(TorchDispatchMode):
    """The most bytes in tensors that were made in this context and lived at the same time.

    What kernels allocate inside themselves does not count, and neither do tensors from before. So
    it is the same on every machine, and does not depend on the allocator.

    Attributes:
        peak: bytes.

    Example:
        >>> with PeakTensors() as memory:
        ...     x = torch.zeros(100)
        ...     y = x + 1
        ...     del x
        ...     z = y.view(10, 10) + 1
        >>> memory.peak
        800
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._remove)
        if reference in self._sizes:
            return
        self._sizes[reference] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)

    def _remove(self, reference: "weakref.ref[Any]") -> None:
        self._now -= self._sizes.pop(reference, 0)


def milliseconds_of(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and how long it took.

    On a CPU it is processor time, which others on the machine do not stretch; on a GPU the time
    until the device has finished.
    """
    if device.type == "cpu":
        began = time.process_time()
        result = call()
        return result, 1e3 * (time.process_time() - began)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    return result, 1e3 * (time.perf_counter() - began)
