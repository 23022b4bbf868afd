"""The package's structure: which way imports run, what it needs, and where its tests are."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import gradkit

PACKAGE = Path(gradkit.__file__).parent
TESTS = Path(__file__).parent
EXAMPLES = PACKAGE.parent / "examples"

# The rooms of the drawing in docs/concepts.md: what each may import besides itself.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "engines": {"core"},
    "alignment": {"core"},
    "surgery": {"core"},
    "weighting": {"core", "surgery"},
    "sharpness": {"core"},
    "divergence": {"core", "sharpness"},
    "teachers": {"core"},
    "every": {"core", "surgery"},
    "losses": {"core"},
    "optimizer": {"core", "engines"},
    "recipes": {"core", "alignment", "sharpness", "divergence", "teachers", "optimizer"},
    "tta": {"core", "alignment", "sharpness", "teachers", "optimizer"},
    "diagnostics": {"core", "optimizer"},
    "testing": {"core", "optimizer"},
}
# Inside the core, each file may import those of earlier rows and its own.
CORE = [
    {"arguments", "interrupts", "random", "ranks"},
    {"flat", "gram"},
    {"combine", "noise", "storage"},
    {"blocks", "displacement", "gradients"},
    {"joining", "oracle", "samples"},
    {"context", "transform"},
]


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


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_follow_the_drawing() -> None:
    seen = 0
    for path in FILES:
        for name in modules(path):
            if name.startswith("gradkit."):
                room = name.split(".")[1]
                assert room in {part(path), *ROOMS[part(path)]}, f"{path} imports {name}"
                seen += 1
    assert seen > 200


def test_the_drawing_in_the_documentation_is_this_one() -> None:
    text = (PACKAGE.parent / "docs" / "concepts.md").read_text()
    block = text.split("## Where the code lies")[1].split("```text\n")[1].split("```")[0]
    found = re.findall(r"^(\w+)(?: +<- ([\w, ]+?))?(?: {3,}.*)?$", block, re.MULTILINE)
    drawn = {name: set(arrow.split(", ")) - {""} for name, arrow in found}
    assert drawn == ROOMS


def test_imports_inside_the_core_run_one_way() -> None:
    layers = {name: number for number, names in enumerate(CORE) for name in names}
    seen = 0
    for path in (PACKAGE / "core").glob("*.py"):
        for name in modules(path):
            if name.startswith("gradkit.core."):
                assert layers[name.split(".")[2]] <= layers[path.stem], f"{path} imports {name}"
                seen += 1
    assert seen > 5


def test_what_examples_share_knows_none_of_them() -> None:
    shared = list((EXAMPLES / "common").rglob("*.py"))
    assert len(shared) > 10
    for path in shared:
        own = {name for name in modules(path) if name.split(".")[0] == "examples"}
        assert all(name.startswith("examples.common.") for name in own), path


def test_it_needs_only_its_dependencies() -> None:
    allowed = {"torch", "numpy", "jaxtyping", "gradkit"} | sys.stdlib_module_names
    for path in FILES:
        # Figures need the extra "plot".
        extra = {"matplotlib"} if path == PACKAGE / "diagnostics" / "plots.py" else set()
        assert {name.split(".")[0] for name in modules(path)} <= allowed | extra, path


def test_every_public_name_is_documented() -> None:
    for name in gradkit.__all__:
        assert getattr(gradkit, name).__doc__, name


def test_every_module_has_tests_that_its_name_leads_to() -> None:
    """A test file of its name, or a row in the README of the tests."""
    _, table = (TESTS / "README.md").read_text().split("| module | tested in |\n")
    rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", table, re.MULTILINE)
    elsewhere = {Path(module): re.findall(r"`(\S+)`", where) for module, where in rows}
    for module, names in elsewhere.items():
        assert names, module
        assert all((TESTS / name).exists() for name in names), module
    modules = {path.relative_to(PACKAGE) for path in FILES if path.name != "__init__.py"}
    own = {path for path in modules if (TESTS / path.with_name(f"test_{path.name}")).exists()}
    assert elsewhere.keys() == modules - own
