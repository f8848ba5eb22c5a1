"""Who may import whom, read from the source.

* ``bitstream`` knows no pixels and no networks; its container needs the standard library only.
* A wing, the folder of one kind of model, imports neither another wing nor training, nor what stands above wings:
  ``kinds``, ``codec`` and the command line.
* Only ``kinds`` names all kinds; ``codec`` names none.
* Nothing but commands imports training, and nothing but ``__main__`` imports the command line.
* ``vaecodec`` itself and the command line load no heavy module before one is needed.
"""

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
    return [path for package in packages for path in sorted(package.rglob("*.py"))]


def named(path: Path) -> str:
    package = next(parent for parent in (BITSTREAM, VAECODEC, BENCHMARKS) if parent in path.parents)
    return str(path.relative_to(package.parent).as_posix())


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


def own(path: Path, on_import: bool = False) -> set[str]:
    """The modules of vaecodec that one of them imports, by their paths in the package without suffix."""
    found: set[str] = set()
    for node in statements(path, on_import):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if alias.name.split(".")[0] == "vaecodec"]
            found |= {name.removeprefix("vaecodec").lstrip(".").replace(".", "/") or "__init__" for name in dotted}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "vaecodec"):
            folder = path.parents[node.level - 1] if node.level else VAECODEC.parent
            base = folder.joinpath(*(node.module or "").split("."))
            for alias in node.names:
                inner = base / alias.name
                module = inner if inner.is_dir() or inner.with_suffix(".py").exists() else base
                found.add(module.relative_to(VAECODEC).as_posix())
    return {"__init__" if name == "." else name for name in found}


def part(name: str) -> str:
    """The folder that a module stands in, or itself."""
    return name.split("/")[0]


WINGS = {"lossy", "lossless", "linear"}
HOUSE = [path for path in modules_of(VAECODEC) if path.parent != VAECODEC / "cli"]


@pytest.mark.parametrize("path", modules_of(*(VAECODEC / wing for wing in sorted(WINGS))), ids=named)
def test_a_wing_knows_itself_and_what_is_below(path: Path) -> None:
    above = {"training", "cli", "kinds", "decoder", "codec", "selftest", "targets", "pillow"}
    assert not {part(name) for name in own(path)} & (WINGS - {path.parent.name} | above)


@pytest.mark.parametrize("path", HOUSE, ids=named)
def test_only_kinds_names_all_kinds(path: Path) -> None:
    inside = {*path.relative_to(VAECODEC).parts} & {"training", "kinds.py"}
    mine = {path.parent.name} & WINGS
    assert inside or {part(name) for name in own(path)} & WINGS <= mine


@pytest.mark.parametrize("path", HOUSE, ids=named)
def test_nothing_below_imports_training_or_commands(path: Path) -> None:
    used = {part(name) for name in own(path)}
    assert path.parent == VAECODEC / "training" or "training" not in used
    assert path == VAECODEC / "__main__.py" or "cli" not in used


def test_the_rules_see_what_is_there() -> None:
    assert {part(name) for name in own(VAECODEC / "kinds.py")} >= WINGS
    assert own(VAECODEC / "__main__.py") >= {"cli"} and "cli/files" in own(VAECODEC / "cli" / "commands.py")
    assert own(VAECODEC / "lossy" / "coder.py") >= {"tiles", "lossy/tile", "lossy/misfits"}


@pytest.mark.parametrize("path", modules_of(BITSTREAM), ids=named)
def test_bitstream_knows_no_networks(path: Path) -> None:
    assert imports(path) <= sys.stdlib_module_names | {"numpy", "constriction"}


@pytest.mark.parametrize("name", ["container.py", "errors.py", "progressive.py"])
def test_container_needs_the_standard_library_only(name: str) -> None:
    assert imports(BITSTREAM / name) <= sys.stdlib_module_names


@pytest.mark.parametrize("path", modules_of(VAECODEC), ids=named)
def test_vaecodec_imports_its_dependencies_only(path: Path) -> None:
    allowed = {"bitstream", "torch", "numpy", "PIL", "safetensors", "click", "tqdm"}
    later = {"imagecodecs", "matplotlib", "pillow_heif", "ssimulacra2", "tifffile"}
    if path.name in ("engine_onnx.py", "engine.py"):  # which kinds import where onnxruntime is installed
        allowed.add("onnxruntime")
    if path.name == "device_coder.py":  # which networks import where CUDA runs them
        allowed.add("triton")
    if path.name == "graphs.py":  # for export
        allowed.add("onnx")
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


LIGHT = [VAECODEC / "__init__.py", VAECODEC / "folders.py", *modules_of(VAECODEC / "cli")]


@pytest.mark.parametrize("path", LIGHT, ids=named)
def test_package_and_command_line_load_no_heavy_modules(path: Path) -> None:
    assert imports(path, on_import=True) <= sys.stdlib_module_names | {"bitstream", "click"}
    mine = {name for name in own(path, on_import=True) if part(name) != "cli"}
    assert mine <= {"__init__", "folders"}


# The bound of a model, the parts of a codec, the arithmetic of engines, a codec of its own, training.
INSIDE = {"bitsback.py", "device_speed.py", "exactness.py", "pca.py", "training_speed.py"}
OUTSIDE = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.name not in INSIDE]


@pytest.mark.parametrize("path", OUTSIDE, ids=named)
def test_benchmarks_use_public_names_only(path: Path) -> None:
    assert "bitstream" not in imports(path)
    public = {
        "vaecodec": {*vaecodec.__all__, "__version__"},
        "vaecodec.cli": {"main"},
        "vaecodec.folders": {"PICTURES"},
        "vaecodec.metrics": {"SIDE_MIN", "compare", "psnr", "ssimulacra2"},
    }
    for node in statements(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vaecodec":
            assert {alias.name for alias in node.names} <= public.get(node.module or "", set()), node.lineno
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "vaecodec" for alias in node.names), node.lineno
