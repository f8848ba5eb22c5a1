"""Who may import whom, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitstream
import vaecodec

BITSTREAM, VAECODEC = (Path(package.__file__).parent for package in (bitstream, vaecodec))
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"  # not there, where an installed wheel is tested


def modules_of(*packages: Path) -> list[Path]:
    return [path for package in packages for path in sorted(package.glob("*.py"))]


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def statements(path: Path, on_import: bool = False) -> Iterator[ast.AST]:
    """Every node of a module, or only those that run when it is imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        yield node
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (on_import and (later or typing)):
            waiting += ast.iter_child_nodes(node)


def imports(path: Path, on_import: bool = False) -> set[str]:
    """Top-level names that a module imports; those of its own package are not listed."""
    names: set[str] = set()
    for node in statements(path, on_import):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", modules_of(BITSTREAM), ids=named)
def test_bitstream_knows_no_networks(path: Path) -> None:
    assert imports(path) <= sys.stdlib_module_names | {"numpy", "constriction"}


@pytest.mark.parametrize("name", ["container.py", "errors.py"])
def test_container_needs_the_standard_library_only(name: str) -> None:
    assert imports(BITSTREAM / name) <= sys.stdlib_module_names


@pytest.mark.parametrize("path", modules_of(VAECODEC), ids=named)
def test_vaecodec_imports_its_dependencies_only(path: Path) -> None:
    allowed = {"bitstream", "torch", "numpy", "PIL", "safetensors", "click", "tqdm"}
    later = {"matplotlib", "tifffile", "pillow_heif"}
    if path.name == "array_codec.py":  # which numcodecs imports
        allowed.add("numcodecs")
    if path.name == "zarr_codec.py":  # which zarr imports
        allowed.add("zarr")
    assert imports(path, on_import=True) <= sys.stdlib_module_names | allowed
    assert imports(path) <= sys.stdlib_module_names | allowed | later


@pytest.mark.parametrize("path", modules_of(BITSTREAM, VAECODEC), ids=named)
def test_nothing_is_fetched_or_unpickled(path: Path) -> None:
    assert not imports(path) & {"socket", "ssl", "http", "urllib", "ftplib", "pickle", "marshal", "shelve"}
    calls = {ast.unparse(node.func) for node in statements(path) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec"}


@pytest.mark.parametrize("name", ["__init__.py", "cli.py", "options.py", "batch.py", "files.py"])
def test_package_and_command_line_load_no_heavy_modules(name: str) -> None:
    assert imports(VAECODEC / name, on_import=True) <= sys.stdlib_module_names | {"bitstream", "click"}
    own: set[str] = set()
    for node in statements(VAECODEC / name, on_import=True):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module} if node.module else {alias.name for alias in node.names}
    assert own <= {"__version__", "options", "batch", "files"}


# One computes the bound of a model, one is a codec of its own, one times training.
INSIDE = {"bitsback.py", "pca.py", "training_speed.py"}
OUTSIDE = [path for path in modules_of(BENCHMARKS) if path.name not in INSIDE]


@pytest.mark.parametrize("path", OUTSIDE, ids=named)
def test_benchmarks_use_public_names_only(path: Path) -> None:
    assert "bitstream" not in imports(path)
    public = {"vaecodec": {*vaecodec.__all__, "__version__"}, "vaecodec.cli": {"main"}, "vaecodec.metrics": {"psnr"}}
    for node in statements(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vaecodec":
            assert {alias.name for alias in node.names} <= public.get(node.module or "", set()), node.lineno
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "vaecodec" for alias in node.names), node.lineno
