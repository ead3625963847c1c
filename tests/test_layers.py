"""What may import what: a room imports from those before it, and from itself; what is in none of them is a stage."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "s2ft_compile"
LINKED = ("passes", "kernels", "exporters")
ROOMS = (
    ("lazy", "config", "errors", "layout", "structure", "plan"),  # values
    ("quantized", "planned"),
    ("capture",),
    ("passes", "kernels"),
    ("slices",),
    ("adapters",),
    ("stages",),
    ("exporters", "serve"),
    ("cli",),
    ("",),  # the package itself
)
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room}


def modules() -> dict[str, Path]:
    """Module name -> file, links resolved by name: `s2ft_compile.passes.permute`."""
    folders = [(PACKAGE, ROOT / PACKAGE), *((f"{PACKAGE}.{d}", (ROOT / PACKAGE / d).resolve()) for d in LINKED)]
    files = {}
    for prefix, folder in folders:
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


def imports(name: str, source: str, is_package: bool, known) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    here, imported = name.split(".") if is_package else name.split(".")[:-1], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) + 1 - node.level]] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known
            imported |= submodules or {base}
    return {m for m in imported if m == PACKAGE or m.startswith(PACKAGE + ".")}


def rank(module: str) -> int:
    top = module.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return RANK.get(top, RANK["stages"])


def upwards(files: dict[str, str]) -> list[str]:
    """Arrows that point up. files: module -> source; a package's name ends in `.__init__`."""
    known = {name.removesuffix(".__init__") for name in files}
    return [
        f"{name} -> {other}"
        for file, source in files.items()
        for name in [file.removesuffix(".__init__")]
        for other in sorted(imports(name, source, file != name, known))
        if rank(other) > rank(name)
    ]


def sources() -> dict[str, str]:
    return {
        name + ".__init__" * (path.name == "__init__.py"): path.read_text(encoding="utf-8")
        for name, path in modules().items()
    }


def test_no_import_points_upwards():
    assert len(sources()) > 60
    assert upwards(sources()) == []


def test_an_arrow_upwards_is_found_however_it_is_written():
    """The control: each of these, added to the real files, is reported, and alone."""
    for module, line in {
        "plan": "from .passes import permute",
        "structure": "import s2ft_compile.passes.couple.couple",
        "quantized": "from .capture.capture import unwrap",
        "capture.pieces": "from s2ft_compile.passes.editor import Editor",
        "passes.couple.couple": "from s2ft_compile.slices.state import State",
        "slices.state": "def f():\n    from s2ft_compile.preparation import prepare",
        "preparation": "def f():\n    from . import exporters",
        "adapters.bank": "from ..exporters.lora import save_lora",
        "passes.permute": "from s2ft_compile.cli.data import load_model",
        "exporters.onnx.export": "from s2ft_compile import cli",
        "kernels.support": "import s2ft_compile",
    }.items():
        files = sources()
        files[f"{PACKAGE}.{module}"] += f"\n{line}\n"
        assert [arrow.split(" -> ")[0] for arrow in upwards(files)] == [f"{PACKAGE}.{module}"], line


def test_the_table_of_places_names_every_place():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is what")[1].split("##")[0]
    named = set(re.findall(r"[\w.]+", table))
    places = {
        path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    places |= {path.name for folder in LINKED for path in (ROOT / folder).iterdir() if path.is_dir()}
    assert places - named - {"__init__", "lazy", "__pycache__", "onnx"} == set()
