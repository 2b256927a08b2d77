"""Imports point down, and nothing in fastft/ hides a standard module."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.conftest import ROOT

# Higher layers may import lower ones, and modules of their own layer.
LAYERS = [
    {"errors", "files", "memory", "phases", "tensor_file", "distributed"},
    {"config", "ops", "profiling"},
    {"tasks", "models", "data", "peft", "optim"},
    {"methods"},
    {"report", "plan"},
    {"engine", "doctor", "sweep", "export"},
    {"cli", "reference"},
    {"__main__", "train"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "fastft").rglob("*.py"))


def unit(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "fastft" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = unit(path.relative_to(ROOT / "fastft").parts)
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.split(".")[0] == "deepspeed":
            assert own == "engine", f"{path.name} imports deepspeed"
        if name.startswith("fastft.") and own != "__init__":
            other = name.split(".")[1]
            assert other in LEVEL or other == "__version__", f"{other} belongs to no layer"
            assert LEVEL.get(other, 0) <= LEVEL[own], f"{own} imports {other}, which is above it"


def test_no_module_hides_a_standard_one():
    names = {p.stem for p in (ROOT / "fastft").glob("*.py")} | {
        p.name for p in (ROOT / "fastft").iterdir() if p.is_dir()
    }
    assert not names & set(sys.stdlib_module_names)
