"""The hooks that torch runs round the steps of all optimizers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch.optim import optimizer as torch_optimizer

Hook = Callable[..., Any]

_muted = threading.local()
_lock = threading.Lock()
_steps_under_way = 0


def global_pre_hooks() -> list[Hook]:
    """What `register_optimizer_step_pre_hook` has registered, in order."""
    return list(torch_optimizer._global_optimizer_pre_hooks.values())


def global_post_hooks() -> list[Hook]:
    """What `register_optimizer_step_post_hook` has registered, in order."""
    return list(torch_optimizer._global_optimizer_post_hooks.values())


class _MuteableHook:
    """A global hook that is not run for an optimizer inside another, in this thread."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def __call__(self, *arguments: Any) -> Any:
        if getattr(_muted, "now", False):
            return None
        return self.hook(*arguments)


@contextmanager
def global_hooks_muted() -> Iterator[None]:
    """Let steps of optimizers in this block, and in this thread, run no global hooks.

    A step counts once, as that of the optimizer which the user steps: hooks that log, count or
    change gradients would otherwise do so again for the base inside, and for whatever the base
    itself holds. Other threads' steps are left alone, and the hooks are put back as they were.
    """
    global _steps_under_way
    registries = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if not any(registries):
        yield
        return
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
