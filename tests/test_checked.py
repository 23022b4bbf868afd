"""Functions are checked as jaxtyping itself checks them, in a test's first calls."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from checked import CALLS, begin_test, jaxtyped
from jaxtyping import Float
from torch import Tensor

import gradkit as gk

made = []  # what the type checker was applied to


def typechecker(function):
    made.append(function)
    return beartype(function)


def scaling(factor: float):
    @jaxtyped(typechecker=typechecker)
    def scale(x: Float[Tensor, " n"], y: Float[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
        if factor < 0:
            return torch.ones(len(x) + 1)
        if factor > 2:
            return scaling(factor - 1)(x)
        return factor * x

    return scale


X = torch.ones(3)


def test_each_function_is_its_own_and_one_checker_serves_them_all() -> None:
    one, two = scaling(1.0), scaling(2.0)
    assert float(one(X)[0]) == 1.0
    before = len(made)
    three = scaling(3.5)  # calls another inside
    assert [float(each(X)[0]) for each in (two, three, one)] == [2.0, 1.5, 1.0]
    assert len(made) == before
    assert one.__name__ == "scale"


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.ones(3).long(), 1.0])
def test_wrong_arguments_and_results_are_found_in_every_function(bad: object) -> None:
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError, match=r"scale.. parameter"):
            scaling(1.0)(bad)
        with pytest.raises(jaxtyping.TypeCheckError, match=r"scale.. parameter"):
            scaling(1.0)(X, torch.ones(4))
        with pytest.raises(jaxtyping.TypeCheckError, match=r"scale.. return"):
            scaling(-1.0)(X)
        assert float(scaling(2.0)(X)[0]) == 2.0  # what failed leaves nothing behind


def test_functions_in_threads_are_not_mixed_up() -> None:
    wait = threading.Barrier(2)

    def waiting(value: float):
        @jaxtyped(typechecker=typechecker)
        def give(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
            wait.wait(60)
            return value * x

        return give

    found: dict[float, float] = {}

    def run(value: float) -> None:
        found[value] = float(waiting(value)(X)[0])

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1.0: 1.0, 2.0: 2.0}


def test_no_function_is_kept() -> None:
    scale = scaling(1.0)
    scale(X)
    kept = weakref.ref(scale.__wrapped__)
    del scale
    gc.collect()
    assert kept() is None


def test_defaults_that_are_objects_are_not_shared() -> None:
    def adding(value: Tensor):
        @jaxtyped(typechecker=typechecker)
        def add(x: Float[Tensor, " n"], y: Float[Tensor, " n"] = value) -> Float[Tensor, " n"]:
            return x + y

        return add

    assert [float(adding(n * X)(X)[0]) for n in (1, 2)] == [2.0, 3.0]


def test_every_kind_of_parameter_is_passed_on_and_checked() -> None:
    @jaxtyped(typechecker=beartype)
    def given(a: int, /, b: int = 2, *more: int, c: int, d: int = 4, **rest: int) -> list[int]:
        return [a, b, *more, c, d, *rest.values()]

    assert given(1, c=3) == [1, 2, 3, 4]
    assert given(1, 5, 6, 7, c=3, d=8, e=9) == [1, 5, 6, 7, 3, 8, 9]
    wrong = [((1, "2"), {}), ((1, 2, "3"), {}), ((1,), {"d": "4"}), ((1,), {"e": "5"})]
    for number, (arguments, named) in enumerate(wrong, 2):
        with pytest.raises(jaxtyping.TypeCheckError, match=rf"given.. parameter .*'{number}'"):
            given(*arguments, c=3, **named)
    with pytest.raises(TypeError, match=r"given.. missing 1 required .* 'c'"):
        given(1)


def test_dataclasses_are_checked_when_they_are_made() -> None:
    @jaxtyped(typechecker=beartype)
    @dataclass(frozen=True)
    class Pair:
        x: Float[Tensor, " n"]
        y: Float[Tensor, " n"]

    assert Pair(X, X).y is X
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter y"):
        Pair(X, torch.ones(4))


def test_a_type_that_only_type_checkers_know_is_any() -> None:
    @jaxtyped(typechecker=beartype)
    def give(x: Float[Tensor, " n"], y: Unknown) -> Unknown:  # type: ignore[name-defined] # noqa: F821
        return y

    assert give(X, 3) == 3
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter x"):
        give(3, 3)


def test_the_package_is_checked_so() -> None:
    checked = jaxtyped(typechecker=beartype)(scaling)
    assert gk.wrap.__code__ is checked.__code__
    assert gk.PCGrad.__init__.__code__ is checked.__code__


def test_the_first_calls_in_a_test_are_checked() -> None:
    @jaxtyped(typechecker=beartype)
    def count(x: Float[Tensor, " n"]) -> int:
        return 1

    for _ in range(2):
        begin_test()
        for _ in range(CALLS):
            with pytest.raises(jaxtyping.TypeCheckError):
                count(1.0)
        assert count(1.0) == 1
