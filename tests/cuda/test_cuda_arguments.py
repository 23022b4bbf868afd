"""The tests on a CUDA device know how to make every method; runs anywhere."""

from __future__ import annotations

import inspect

from on_device import ARGUMENTS, METHODS

import gradkit as gk


def test_every_exported_method_can_be_made() -> None:
    for name in METHODS:
        needed = [
            each.name
            for each in inspect.signature(getattr(gk, name)).parameters.values()
            if each.default is each.empty
            and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
        assert not needed or name in ARGUMENTS, f"say how to make {name}, which needs {needed}"
