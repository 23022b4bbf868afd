"""The global hooks that torch runs before and after every optimizer's step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.optim import optimizer as torch_optimizer

Hook = Callable[..., Any]

_muted = threading.local()
_lock = threading.Lock()
_steps_under_way = 0


def global_pre_hooks() -> list[Hook]:
    """The hooks registered with `register_optimizer_step_pre_hook`, in order."""
    return list(torch_optimizer._global_optimizer_pre_hooks.values())


def global_post_hooks() -> list[Hook]:
    """The hooks registered with `register_optimizer_step_post_hook`, in order."""
    return list(torch_optimizer._global_optimizer_post_hooks.values())


class _MuteableHook:
    """A global hook that is not called in a thread where hooks are muted."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def __call__(self, *arguments: Any) -> Any:
        if getattr(_muted, "now", False):
            return None
        return self.hook(*arguments)


def global_hooks_muted() -> AbstractContextManager[None]:
    """Mute global hooks for the steps of optimizers in this block and thread.

    A step counts once, for the optimizer that the user steps. Hooks that log, count or change
    gradients would otherwise run again for the base, and for an optimizer inside the base. Steps of
    other threads are not affected. After the block the hooks are registered as before.
    """
    registries = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return _all_muted(registries) if any(registries) else nullcontext()


@contextmanager
def _all_muted(registries: tuple[MutableMapping[int, Hook], ...]) -> Iterator[None]:
    global _steps_under_way
    before = getattr(_muted, "now", False)
    with _lock:
        _steps_under_way += 1
        _exchange(
            registries,
            lambda hook: hook if isinstance(hook, _MuteableHook) else _MuteableHook(hook),
        )
    _muted.now = True
    try:
        yield
    finally:
        _muted.now = before
        with _lock:
            _steps_under_way -= 1
            if not _steps_under_way:
                _exchange(
                    registries, lambda hook: hook.hook if isinstance(hook, _MuteableHook) else hook
                )


def _exchange(
    registries: tuple[MutableMapping[int, Hook], ...], change: Callable[[Hook], Hook]
) -> None:
    for registry in registries:
        for key, hook in list(registry.items()):
            registry[key] = change(hook)
