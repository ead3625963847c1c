"""`s2ft serve`: loads the model and its adapters, and runs the server until it is told to stop."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from s2ft_compile.errors import ConfigError
from s2ft_compile.quantized import quantized_in

from .arguments import adapter_folder
from .data import load_model, load_tokenizer


def run(
    base: str,
    adapters: Sequence[str],
    name: str | None,
    host: str,
    port: int,
    key: str | None,
    root: Path | None,
    limits: Mapping[str, Any],
    dtype: str,
    quantize: str,
    console: Console,
) -> None:
    """adapters: NAME=FOLDER. Raises `ConfigError`, `AdapterError`, or `OSError` for an address that is taken."""
    folders = named(adapters)
    name = name or Path(base).name
    if name in folders:
        raise ConfigError(
            f"an adapter and the base model are both called {name!r}; --name NAME calls the model otherwise"
        )
    if root is not None and not root.is_dir():
        raise ConfigError(f"--adapter-root {root} is no folder")
    try:
        import uvicorn

        from s2ft_compile.serve.server import Options, build
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}; pip install 's2ft-compile\\[serve]'") from error
    with socket.create_server((host, port)) as listening:  # before the minutes that loading may take
        with console.status(f"loading {base}"):
            engine, tokenizer = loaded(base, folders, limits, dtype, quantize)
        app = build(engine, tokenizer, Options(name, key, root))
        where = f"http://{host}:{listening.getsockname()[1]}"
        console.print(f"{name} at {where}, adapters: {', '.join(folders) or 'none'}", highlight=False)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
        uvicorn.Server(config).run(sockets=[listening])


def loaded(
    base: str, folders: Mapping[str, Path], limits: Mapping[str, Any], dtype: str = "auto", quantize: str = "none"
) -> tuple[Any, Any]:
    """The engine, not started, and the tokenizer. On a GPU, if there is one."""
    import torch

    from s2ft_compile.serve.engine import Engine, Limits

    tokenizer, model = load_tokenizer(base), load_model(base, dtype, quantize)
    model = model.cuda() if torch.cuda.is_available() and not quantized_in(model) else model
    engine = Engine(model, Limits(**limits), ends_of(model, tokenizer))
    for name, folder in folders.items():
        engine.add(name, folder)
    return engine, tokenizer


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER of each. Raises `ConfigError`, or `AdapterError` for what is no folder."""
    folders: dict[str, Path] = {}
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter is NAME=FOLDER, such as law=adapters/law; got {text!r}")
        if name in folders:
            raise ConfigError(f"two adapters are called {name!r}")
        folders[name] = Path(folder)
    return {name: adapter_folder(folder) for name, folder in folders.items()}


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, or else the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
