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
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype.roar import BeartypeCallHintViolation

CALLS = 50
"""How many calls of each function are checked in a test."""

_ORIGINAL = jaxtyping.jaxtyped

Checkers = tuple[Callable[..., Any], Callable[..., Any]]
"""What checks a function's arguments, and what checks its result."""

_CALLS: dict[types.CodeType, int] = {}
_CHECKERS: dict[tuple[types.CodeType, int], Checkers] = {}


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
    import torch  # not by xdist's controlling process, which runs none of the package's functions

    code = function.__code__
    checkers: Checkers | None = None

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checkers
        if jaxtyping.config.jaxtyping_disable or torch.compiler.is_dynamo_compiling():
            return function(*arguments, **named)
        calls = _CALLS.get(code, 0)
        if calls >= CALLS:
            return function(*arguments, **named)
        _CALLS[code] = calls + 1
        if checkers is None:
            checkers = _checkers(function, typechecker)
        check_arguments, check_result = checkers
        try:
            with _ORIGINAL("context"):
                # It is over before the function runs, which may count references.
                check_arguments(*arguments, **named)
                return check_result(function(*arguments, **named))
        except BeartypeCallHintViolation as error:
            raise jaxtyping.TypeCheckError(str(error)) from error

    return call


def _checkers(function: types.FunctionType, typechecker: Callable[..., Any]) -> Checkers:
    if not all(isinstance(annotation, str) for annotation in function.__annotations__.values()):
        return _made(function, typechecker)  # two of one definition may differ
    key = (function.__code__, id(function.__globals__))
    if key not in _CHECKERS:
        _CHECKERS[key] = _made(function, typechecker)
    return _CHECKERS[key]


def _made(function: types.FunctionType, typechecker: Callable[..., Any]) -> Checkers:
    """Checked functions that do nothing: one of the same parameters, one of the same result.

    All defaults are None, since only what is passed is checked.
    """
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
        for p in inspect.signature(function).parameters.values()
    ]
    scope: dict[str, Any] = {}
    exec(
        f"def arguments{inspect.Signature(parameters)}: pass\ndef result(value): return value",
        scope,
    )
    annotations = {
        name: _resolved(annotation, function.__globals__)
        for name, annotation in function.__annotations__.items()
    }
    returned = {name: annotations.pop(name) for name in ("return",) if name in annotations}
    for each in (scope["arguments"], scope["result"]):
        each.__module__, each.__name__ = function.__module__, function.__name__
        each.__qualname__ = function.__qualname__
    scope["arguments"].__annotations__, scope["result"].__annotations__ = annotations, returned
    return typechecker(scope["arguments"]), typechecker(scope["result"])


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """The type that an annotation stands for; any, where it names what only type checkers know."""

    def one() -> None: ...

    one.__annotations__ = {"value": annotation}
    try:
        return typing.get_type_hints(one, names, include_extras=True)["value"]
    except NameError:
        return Any
