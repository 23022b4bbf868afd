"""Type checks of functions inside functions, made once instead of at every call around them.

`--jaxtyping-packages` decorates every function of the package when it is defined; one inside
another function, at each call of that. This took half of all time in the tests. What it makes
depends on the signature alone, so that one checker serves all functions of one definition.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import jaxtyping

_MARKS = (type(None), bool, int, float, str)
_ORIGINAL = jaxtyping.jaxtyped


class _Running(threading.local):
    """The functions that a checker is about to call, innermost last."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []


_RUNNING = _Running()
_CHECKERS: dict[tuple[Any, ...], tuple[types.CodeType, Callable[..., Any]]] = {}


def check_inner_functions_once() -> None:
    """Put `jaxtyped` in the place of jaxtyping's own, for as long as this process lives."""
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """As `jaxtyping.jaxtyped`: the same checks, and the same errors."""
    original = _ORIGINAL(typechecker=typechecker)

    def decorate(function: Any) -> Any:
        key = _key(function)
        if key is None:
            return original(function)
        if key not in _CHECKERS:
            _CHECKERS[key] = (function.__code__, original(_stand_in(function)))
        _, checker = _CHECKERS[key]

        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            __tracebackhide__ = True
            functions = _RUNNING.functions
            depth = len(functions)
            functions.append(function)
            try:
                return checker(*arguments, **named)
            finally:
                del functions[depth:]  # it is still there where the arguments' check has raised

        return checked

    return decorate


def _key(function: Any) -> tuple[Any, ...] | None:
    """What a function shares with all others of its definition; None where one might differ."""
    if not isinstance(function, types.FunctionType) or "<locals>" not in function.__qualname__:
        return None
    named = function.__kwdefaults__ or {}
    defaults = (*(function.__defaults__ or ()), *named.values())
    if not all(isinstance(value, _MARKS) for value in defaults):
        return None
    if not all(isinstance(annotation, str) for annotation in function.__annotations__.values()):
        return None
    kinds = tuple((type(value), value) for value in defaults)
    return (id(function.__code__), id(function.__globals__), *named, *kinds)


def _stand_in(function: types.FunctionType) -> Callable[..., Any]:
    """A function of the same signature that calls the one whose turn it is, and keeps none."""

    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        return running.functions.pop()(*arguments, **named)

    running = _RUNNING
    made = types.FunctionType(
        call.__code__, function.__globals__, function.__name__, None, call.__closure__
    )
    functools.update_wrapper(made, function)
    del made.__wrapped__
    made.__signature__ = inspect.signature(function)  # type: ignore[attr-defined] # any function's
    return made
