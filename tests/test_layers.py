"""Who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bitstream"


def imports(path: Path) -> set[str]:
    """Top-level names that a module imports; those of its own package are not listed."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_bitstream_knows_no_networks(path: Path) -> None:
    assert imports(path) <= sys.stdlib_module_names | {"numpy", "constriction"}


@pytest.mark.parametrize("name", ["container.py", "errors.py"])
def test_container_needs_the_standard_library_only(name: str) -> None:
    assert imports(PACKAGE / name) <= sys.stdlib_module_names
