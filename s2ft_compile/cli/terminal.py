"""What the command line shows and writes: errors, progress bars, JSON files."""

import json
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from s2ft_compile.errors import S2FTError, of_the_system


@contextmanager
def reported(console: Console, debug: bool) -> Iterator[None]:
    """An error of this package, or of the system, becomes one red line and exit code 1; `debug` lets it through."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # those of single files; the commands show their own
    logging.getLogger("torchao").addFilter(_matters)
    try:
        yield
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # dynamo's is around that of a backend
        if debug or not (isinstance(cause, S2FTError) or of_the_system(cause)):
            raise
        text = str(cause).encode("utf-8", "backslashreplace").decode()  # a damaged file may hold half of a character
        console.print(f"[bold red]error:[/] [red]{escape(text)}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _matters(record: logging.LogRecord) -> bool:
    """torchao warns of each of its libraries for GPUs (`_C_cutlass_90a...`) that does not load where there is none."""
    import torch

    return torch.cuda.is_available() or "/_C_" not in record.getMessage()


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def counter(bars: Progress, description: str) -> Callable[[int, int], None]:
    """A function of (done, total) that moves a bar of its own."""
    task = bars.add_task(description, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def write_json(path: Path, values: Any) -> None:
    """All of it, or the file stays as it was."""
    from s2ft_compile.exporters.files import write_text

    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "s2ft-compile", "onnxruntime")
    installed = {d.metadata["Name"]: d.version for d in map(_distribution, names) if d}
    return {"python": platform.python_version(), **installed}


def _distribution(name: str):
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None  # an uninstalled checkout, or an optional package
