"""What importing costs and refuses: no torch for a help text, one copy of each module, links that are links."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import s2ft_compile as s2ft

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with `folder` first on its path, as from an editor at the root."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


def last_line(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 1, run
    return run.stderr.strip().splitlines()[-1]


LOADED = "; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'onnx', 'numpy'}))"


def test_the_package_imports_nothing_large_until_it_is_used():
    run = python("import s2ft_compile as s2ft; s2ft.S2FTConfig(); s2ft.ConfigError; dir(s2ft)" + LOADED)
    assert run.stdout == "[]\n", run
    run = python("import s2ft_compile as s2ft; s2ft.Plan" + LOADED)  # the control: a plan holds tensors
    assert "torch" in run.stdout, run


def test_help_needs_no_torch():
    code = "from s2ft_compile.cli.app import app; app(['train', '--help'], standalone_mode=False)" + LOADED
    run = python(code)
    assert run.stdout.splitlines()[-1] == "[]" and "--targets" in run.stdout, run


@pytest.mark.parametrize("package", [s2ft, s2ft.exporters], ids=lambda p: p.__name__)
def test_every_public_name_is_there_for_python_and_for_editors(package):
    """The table of names says the same as the imports that only type checkers see."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    (table,) = [n for n in ast.walk(tree) if isinstance(n, ast.Dict)]
    where = {key.value: value.value for key, value in zip(table.keys, table.values)}
    seen = {a.name: n.module.removeprefix(f"{package.__name__}.") for n in block.body if n.module for a in n.names}
    assert seen == where
    assert set(package.__all__) - {"exporters"} == set(where) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None


def of_the_package(member) -> bool:
    function = getattr(member, "fget", getattr(member, "func", getattr(member, "__func__", member)))
    return getattr(function, "__module__", "").startswith("s2ft_compile") and callable(function)


PUBLIC = [s2ft, s2ft.exporters, s2ft.rules, s2ft.selections, s2ft.testing, s2ft.config, s2ft.errors, s2ft.quantized]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_every_public_name_says_what_it_is(module):
    """Classes and functions, and what a class has besides its fields."""
    names = getattr(module, "__all__", [n for n, value in vars(module).items() if of_the_package(value)])
    silent = []
    for name in (n for n in names if not n.startswith("_")):
        value = getattr(module, name)
        hidden = ("_", *getattr(value, "__dataclass_fields__", ()))
        own = vars(value) if isinstance(value, type) else {}
        checked = {name: value, **{f"{name}.{m}": v for m, v in own.items() if not m.startswith(hidden)}}
        docs = {m: v.__doc__ or "" for m, v in checked.items() if of_the_package(v)}
        silent += [m for m, doc in docs.items() if not doc or doc.startswith(f"{name}(")]  # that of `dataclass`
    assert silent == []


def test_an_unknown_name_is_no_attribute():
    for package in (s2ft, s2ft.exporters):
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            package.nonsense  # noqa: B018
    assert not hasattr(s2ft, "__wrapped__")
    with pytest.raises(ImportError):
        from s2ft_compile import nonsense  # noqa: F401


BARE = [
    "passes.backward.attach",
    "passes.permute",
    "exporters",
    "exporters.lora",
    "kernels.slice_grad",
    "kernels.refresh",
    "kernels.adapters",
    "kernels.support",
]


@pytest.mark.parametrize("module", BARE)
def test_a_bare_name_fails_and_says_what_to_import(module):
    top = module.split(".")[0]
    assert f"import s2ft_compile.{top} instead" in last_line(python(f"import {module}"))


def test_every_kernel_is_guarded():
    """A module that does not import the guard would be importable twice."""
    kernels = {f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels == {module for module in BARE if module.startswith("kernels")}


def test_a_checkout_without_links_says_so(tmp_path):
    """As Git leaves it where core.symlinks is false: files that hold the links' targets."""
    shutil.copytree(ROOT / "s2ft_compile", tmp_path / "s2ft_compile", ignore=shutil.ignore_patterns("passes"))
    (tmp_path / "s2ft_compile" / "passes").write_text("../passes")
    line = last_line(python("import s2ft_compile", tmp_path))
    assert "passes was checked out as a file" in line and "core.symlinks true" in line
    (tmp_path / "s2ft_compile" / "passes").unlink()
    assert python("import s2ft_compile", tmp_path).returncode == 0, "or something else was refused"
