"""The code in README and docs runs, their commands parse, and what they link to is there."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from examples.common.command_line import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# Lightning 2.6 calls what torch 2.13 deprecates, and recommends worker processes to everyone.
@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)
@pytest.mark.filterwarnings(r"ignore:The '(train|test)_dataloader' does not have many workers")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # some of it writes files
    module = types.ModuleType("page")  # a real one, so that what it defines can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), vars(module))


def test_the_site_has_every_page_and_a_search() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    menu = re.findall(r"^  - .*: (\S+\.md)$", config, re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    # mkdocs leaves its search out where plugins are listed without it
    assert re.search(r"^plugins:\n(?:  .*\n)*?  - search\b", config, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def commands_of(page: Path) -> list[list[str]]:
    """The words of each call of a program or of `make` in a page's shell blocks."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            program = words.index("-m") + 1 if "-m" in words else 0
            if program or words[:1] == ["make"]:
                found.append(words[program:])
    return found


@pytest.mark.parametrize("page", list(filter(commands_of, PAGES)), ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *words in commands_of(page):
        if program == "make":
            assert words[0] in targets
        elif "--help" not in words:
            semi = program in ("examples.prostate", "examples.fundus.semi")
            module = "examples.semi.command_line" if semi else f"{program}.__main__"
            parse(importlib.import_module(module).COMMANDS, words, prog=program, description="")
