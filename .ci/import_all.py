"""Imports every module of an installed s2ft_compile: `import_all.py FOLDER`, the folder it has to come from."""

import sys
from importlib import import_module
from pathlib import Path

import s2ft_compile

root = Path(s2ft_compile.__file__).parent
if root != Path(sys.argv[1]).resolve() / "s2ft_compile":
    sys.exit(f"s2ft_compile came from {root}, not from {sys.argv[1]}")
if absent := [name for name in ("py.typed", "cli/page.html") if not (root / name).is_file()]:
    sys.exit(f"the wheel lacks {', '.join(absent)}")
names = sorted(".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py"))
for name in names:
    import_module(name.removesuffix(".__init__"))
for name in s2ft_compile.__all__:
    getattr(s2ft_compile, name)
print(f"{len(names)} modules imported from {root}")
