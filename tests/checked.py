"""Type checks that leave time for the tests.

`--jaxtyping-packages` has jaxtyping check each function of the package, which takes ten times as
long as beartype's own check. Here beartype checks each function in jaxtyping's context, where a
dimension has one size. A checker is made at a function's first call, and serves all functions of
one definition inside another function. And each test checks a function's first calls only: in a
training of a hundred steps the later ones show nothing new.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype.roar import BeartypeCallHintViolation

CALLS = 50
"""How many calls of each function are checked in a test."""

_MARKS = (type(None), bool, int, float, str)
_ORIGINAL = jaxtyping.jaxtyped
_PASSED = {
    inspect.Parameter.POSITIONAL_ONLY: "{0}",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "{0}",
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}


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
    """As `jaxtyping.jaxtyped`: the same checks, and an error of the same type, in first calls."""

    def decorate(made: Any) -> Any:
        if isinstance(made, types.FunctionType):
            return _in_first_calls(made, typechecker)
        if not isinstance(made, type):
            return _ORIGINAL(typechecker=typechecker)(made)
        init = vars(made).get("__init__")
        if dataclasses.is_dataclass(made) and not hasattr(init, "__wrapped__"):
            made.__init__ = decorate(init)  # type: ignore[misc] # which `dataclass` has written
        return made

    return decorate


def _in_first_calls(function: types.FunctionType, typechecker: Callable[..., Any]) -> Any:
    code = function.__code__
    checker: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checker
        calls = _CALLS.get(code, 0)
        if calls >= CALLS or jaxtyping.config.jaxtyping_disable:
            return function(*arguments, **named)
        _CALLS[code] = calls + 1
        if checker is None:
            checker = _checker(function, typechecker)
        functions = _RUNNING.functions
        depth = len(functions)
        functions.append(function)
        try:
            with _ORIGINAL("context"):
                return checker(*arguments, **named)
        except BeartypeCallHintViolation as error:
            raise jaxtyping.TypeCheckError(str(error)) from error
        finally:
            del functions[depth:]  # it is still there where the arguments' check has raised

    return call


def _checker(function: types.FunctionType, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    key = _key(function)
    if key is None:
        return typechecker(_stand_in(function))
    if key not in _CHECKERS:
        _CHECKERS[key] = (function.__code__, typechecker(_stand_in(function)))
    return _CHECKERS[key][1]


def _key(function: types.FunctionType) -> tuple[Any, ...] | None:
    """What a function shares with all others of its definition; None where one might differ."""
    named = function.__kwdefaults__ or {}
    defaults = (*(function.__defaults__ or ()), *named.values())
    if not all(isinstance(value, _MARKS) for value in defaults):
        return None
    if not all(isinstance(annotation, str) for annotation in function.__annotations__.values()):
        return None
    kinds = tuple((type(value), value) for value in defaults)
    return (id(function.__code__), id(function.__globals__), *named, *kinds)


def _stand_in(function: types.FunctionType) -> types.FunctionType:
    """A function of the same signature that calls the one whose turn it is, and keeps none."""
    parameters = inspect.signature(function).parameters.values()
    bare = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
        for p in parameters
    ]
    signature = inspect.Signature(bare)
    passed = ", ".join(_PASSED[p.kind].format(p.name) for p in parameters)
    scope: dict[str, Any] = {"_running": _RUNNING}
    exec(f"def stand_in{signature}: return _running.functions.pop()({passed})", scope)
    made: types.FunctionType = scope["stand_in"]
    functools.update_wrapper(made, function)
    del made.__wrapped__  # type: ignore[attr-defined] # set by update_wrapper
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    made.__annotations__ = {
        name: _resolved(annotation, function.__globals__)
        for name, annotation in function.__annotations__.items()
    }
    return made


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """The type that an annotation stands for; any, where it names what only type checkers know."""

    def one() -> None: ...

    one.__annotations__ = {"value": annotation}
    try:
        return typing.get_type_hints(one, names, include_extras=True)["value"]
    except NameError:
        return Any
