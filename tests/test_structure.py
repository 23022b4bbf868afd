"""The package's structure: which way imports run, and what a wheel holds."""

from __future__ import annotations

import ast
from pathlib import Path

import gradkit

PACKAGE = Path(gradkit.__file__).parent

# Each module may import those of lower layers, and those of its own.
LAYERS = [
    {"flat", "gram", "random", "interrupts"},
    {"oracle", "objectives", "record"},
    {"engines", "lookahead", "step_size", "surgery", "sharpness", "teacher", "state"},
    {"attempt"},
    {"optimizer"},
    {"recipes", "tta", "testing"},
]
ENGINES, TRANSFORMS = {"engines"}, {"lookahead", "step_size", "surgery", "sharpness", "teacher"}


def imports() -> dict[Path, set[str]]:
    """For each file, the parts of gradkit that it imports."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = node.module.split(".")
                if module == ["gradkit"]:
                    names |= {alias.name for alias in node.names}
                elif module[0] == "gradkit":
                    names.add(module[1])
                else:
                    names.add(module[0])
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
        found[path] = names
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def test_imports_run_one_way() -> None:
    known = set().union(*LAYERS)
    for path, names in imports().items():
        if part(path) == "__init__":
            continue
        assert part(path) in known, path
        for name in names & known:
            assert layer(name) <= layer(part(path)), f"{path.name} imports {name}"
            assert not (part(path) in TRANSFORMS and name in ENGINES), path
            assert not (part(path) in ENGINES and name in TRANSFORMS), path


def test_gradkit_needs_only_its_dependencies() -> None:
    allowed = {"torch", "numpy", "jaxtyping", "gradkit"}
    import sys

    for path, names in imports().items():
        known = set().union(*LAYERS)
        others = names - known - allowed - sys.stdlib_module_names
        assert not {name for name in others if name != part(path)} - set(gradkit.__all__), path


def test_every_public_name_is_documented() -> None:
    for name in gradkit.__all__:
        assert getattr(gradkit, name).__doc__, name
