"""What may import what: values know nothing of the compiler, and the compiler nothing of exporters or the command line.

values < passes, kernels, core, adapters < exporters < cli < the package itself
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "s2ft_compile"
LINKED = ("passes", "kernels", "exporters")
VALUES = ("config", "errors", "layout", "structure", "plan")


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
    return {**dict.fromkeys(VALUES, 0), "exporters": 2, "cli": 3, "": 4}.get(top, 1)


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
        "state": "def f():\n    from . import exporters",
        "adapters.bank": "from ..exporters.lora import save_lora",
        "passes.permute": "from s2ft_compile.cli.data import load_model",
        "exporters.onnx.export": "from s2ft_compile import cli",
        "kernels.support": "import s2ft_compile",
    }.items():
        files = sources()
        files[f"{PACKAGE}.{module}"] += f"\n{line}\n"
        assert [arrow.split(" -> ")[0] for arrow in upwards(files)] == [f"{PACKAGE}.{module}"], line
