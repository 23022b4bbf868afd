"""Type checks that leave time for the tests.

`--jaxtyping-packages` decorates every function of the package when it is defined; one inside
another function, at each call of that. What it makes depends on the signature alone, so that here
one checker serves all functions of one definition. And each test checks a function's first calls
only: in a training of a hundred steps the later ones show nothing new, and took most of the time.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import jaxtyping

CALLS = 50
"""How many calls of each function are checked in a test."""

_MARKS = (type(None), bool, int, float, str)
_ORIGINAL = jaxtyping.jaxtyped


class _Running(threading.local):
    """The functions that a checker is about to call, innermost last."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []


_RUNNING = _Running()
_CALLS: dict[types.CodeType, int] = {}
_CHECKERS: dict[tuple[Any, ...], tuple[types.CodeType, Callable[..., Any]]] = {}


def check_quickly() -> None:
    """Put `jaxtyped` in the place of jaxtyping's own, for as long as this process lives."""
    jaxtyping.jaxtyped = jaxtyped


def begin_test() -> None:
    """Count calls anew."""
    _CALLS.clear()


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """As `jaxtyping.jaxtyped`: the same checks, and the same errors, in the first calls."""
    original = _ORIGINAL(typechecker=typechecker)

    def decorate(function: Any) -> Any:
        if not isinstance(function, types.FunctionType):
            return original(function)
        key = _key(function)
        if key is None:
            return _in_first_calls(function, original(function))
        if key not in _CHECKERS:
            _CHECKERS[key] = (function.__code__, original(_stand_in(function)))
        _, checker = _CHECKERS[key]

        def checked(*arguments: Any, **named: Any) -> Any:
            __tracebackhide__ = True
            functions = _RUNNING.functions
            depth = len(functions)
            functions.append(function)
            try:
                return checker(*arguments, **named)
            finally:
                del functions[depth:]  # it is still there where the arguments' check has raised

        return _in_first_calls(function, checked)

    return decorate


def _in_first_calls(function: types.FunctionType, checked: Callable[..., Any]) -> Any:
    code = function.__code__

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        calls = _CALLS.get(code, 0)
        if calls >= CALLS:
            return function(*arguments, **named)
        _CALLS[code] = calls + 1
        return checked(*arguments, **named)

    return call


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
