"""What several commands take: their common arguments, the folders that these name, and where they print."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from s2ft_compile.errors import AdapterError

out, err = Console(), Console(stderr=True)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[str, typer.Option("--model", help="The base model: a Hugging Face folder, or a hub id.")]
ADAPTER = "An adapter folder, or the output folder of `s2ft train`."
Adapter = Annotated[Path, typer.Option("--adapter", help=ADAPTER)]
Output = Annotated[Path, typer.Option("--output", help="The folder to write; must not exist yet.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of the weights: auto, float32, bfloat16 or float16. [default: the training run's]"),
]


def adapter_folder(path: Path) -> Path:
    """The adapter that `path` is, or that a training run left in it."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not folder.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise AdapterError(f"adapter folder {path} {what}; valid: an adapter, or the output of `s2ft train`")
    return folder
