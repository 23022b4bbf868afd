"""The package's structure: which way imports run, and what it needs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import gradkit

PACKAGE = Path(gradkit.__file__).parent
EXAMPLES = PACKAGE.parent / "examples"

# Each part may import those of lower layers, and those of its own.
LAYERS = [
    {"bases", "hooks", "random", "interrupts", "processes", "scaling"},
    {"flat", "gram"},
    {"gradients", "record", "objectives"},
    {"oracle", "nonfinite"},
    {"engines", "lookahead", "step_size", "surgery", "sharpness", "teacher", "state", "weighting"},
    {"attempt"},
    {"optimizer"},
    {"wrapping"},
    {"recipes", "tta", "testing"},
]
ENGINES = {"engines"}
TRANSFORMS = {"lookahead", "step_size", "surgery", "sharpness", "teacher", "weighting"}


def modules(path: Path) -> set[str]:
    """The full names of what a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_run_one_way() -> None:
    seen = 0
    for path in FILES:
        own = {name.split(".")[1] for name in modules(path) if name.startswith("gradkit.")}
        for name in own:
            assert layer(name) <= layer(part(path)), f"{path.name} imports {name}"
            assert not (part(path) in TRANSFORMS and name in ENGINES), path
            assert not (part(path) in ENGINES and name in TRANSFORMS), path
            seen += 1
    assert seen > 50


def test_what_examples_share_knows_none_of_them() -> None:
    shared = list((EXAMPLES / "common").rglob("*.py"))
    assert len(shared) > 10
    for path in shared:
        own = {name for name in modules(path) if name.split(".")[0] == "examples"}
        assert all(name.startswith("examples.common.") for name in own), path


def test_it_needs_only_its_dependencies() -> None:
    allowed = {"torch", "numpy", "jaxtyping", "gradkit"} | sys.stdlib_module_names
    for path in FILES:
        assert {name.split(".")[0] for name in modules(path)} <= allowed, path


def test_every_public_name_is_documented() -> None:
    for name in set(gradkit.__all__) - {"Oracle"}:  # a type alias, documented beside it
        assert getattr(gradkit, name).__doc__, name
