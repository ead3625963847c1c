"""`s2ft export`: a base model and an adapter become files that other programs run."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from s2ft_compile.errors import ConfigError

from .arguments import ADAPTER, Adapter, Debug, Dtype, Model, Output, adapter_folder, err, out
from .terminal import reported

export_app = typer.Typer(
    help="Turn a base model and an adapter into files that other programs run.", no_args_is_help=True
)


@export_app.command("merged")
def export_merged(
    model: Model,
    adapter: Adapter,
    output: Output,
    dtype: Dtype = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Quantize it again, as the run did; says what that loses.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write base + adapter as an ordinary Hugging Face folder, with the tokenizer."""
    with reported(err, debug):
        from s2ft_compile.exporters.files import new_directory
        from s2ft_compile.exporters.merged import REQUANTIZED, write_merged, write_requantized

        with err.status("merging"), new_directory(output) as work:
            tokenizer = _tokenizer(model)
            adapted = _adapted(model, adapter, dtype)
            if requantize:
                write_requantized(adapted, work)
                changes = json.loads((work / REQUANTIZED).read_text(encoding="utf-8"))
            else:
                write_merged(adapted, work, dequantize=True)
            if tokenizer:
                tokenizer.save_pretrained(work)
        out.print(f"merged model: {output}")
        if requantize:
            worst = max((change["largest_change"] for change in changes.values()), default=0.0)
            out.print(f"trained entries are up to {worst:.2g} from what was trained: {output / REQUANTIZED}")


@export_app.command("adapter")
def export_adapter(model: Model, adapter: Adapter, output: Output, dtype: Dtype = None, debug: Debug = False) -> None:
    """Check an adapter against its base model, and copy it to a folder of its own to hand on."""
    with reported(err, debug):
        from s2ft_compile.adapters.format import read_adapter
        from s2ft_compile.exporters import load_adapter
        from s2ft_compile.exporters.files import new_directory

        with err.status("checking"), new_directory(output) as work:
            folder = adapter_folder(adapter)
            plan = load_adapter(_base(model, adapter, dtype), folder)
            for file in (f for f in folder.iterdir() if f.is_file()):
                shutil.copyfile(file, work / file.name)
            read_adapter(work)  # whose checksums tell whether the copy is whole
        out.print(str(plan))
        out.print(f"adapter: {output}")


@export_app.command("onnx")
def export_onnx(
    model: Model,
    output: Annotated[Path, typer.Option("--output", help="The .onnx file to write; must not exist yet.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help=ADAPTER + " [default: the model as it is]")] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="The base model, and the adapter in a file .onnx_adapter beside it.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="For generation: a KV cache as inputs and outputs; causal models.")
    ] = False,
    genai: Annotated[
        bool,
        typer.Option(
            "--genai",
            help="For onnxruntime-genai: --cache, its genai_config.json and the tokenizer beside "
            "the file, and --separate as Olive's LoRA.",
        ),
    ] = False,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: the weights of products in fewer bits; an adapter stays in float.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set. [default: 20]")] = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Write a model, or base + adapter, as an ONNX file with dynamic batch and sequence."""
    with reported(err, debug):
        from s2ft_compile.exporters import export_onnx as write

        from .data import example_inputs

        names = {"names": "genai"} if genai else {}
        options = {"cache": cache or genai, "quantize": quantize, **names}
        options |= {} if opset is None else {"opset": opset}
        if separate:
            _export_separate(model, output, adapter, dtype, options, names)
        else:
            with err.status("exporting"):
                adapted = _adapted(model, adapter, dtype)
                write(adapted, output, example_inputs(adapted), **options)
            out.print(f"ONNX model: {output}")
        tokenizer = _tokenizer(model) if genai else None
        if tokenizer and not (output.parent / "tokenizer_config.json").exists():
            _save_beside(tokenizer, output.parent)


@export_app.command("lora")
def export_lora(
    model: Model,
    adapter: Adapter,
    output: Output,
    layout: Annotated[
        str,
        typer.Option(help="padded (one rank: right everywhere) or pattern (each its own: smaller, not for llama.cpp)."),
    ] = "padded",
    ranks: Annotated[str, typer.Option(help="exact, vllm (rounded up to what vLLM takes), or a number.")] = "exact",
    truncate: Annotated[bool, typer.Option(help="Cut ranks above the limit by SVD, and report the error.")] = False,
    linear_only: Annotated[
        bool, typer.Option("--linear-only", help="Leave out norms and biases, which only PEFT takes; reports the loss.")
    ] = False,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Write an adapter as a LoRA of PEFT's format, exactly; PEFT, vLLM and llama.cpp load it."""
    with reported(err, debug):
        from s2ft_compile.exporters import save_lora

        with err.status("converting"):
            base = _base(model, adapter, dtype)
            number = int(ranks) if ranks.isdecimal() else ranks
            save_lora(
                base,
                output,
                layout,
                number,
                adapter=adapter_folder(adapter),
                truncate=truncate,
                linear_only=linear_only,
            )
        size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        out.print(f"LoRA: {output}, {size / 1e6:,.1f} MB; its README.md says for which programs")


@export_app.command("shira")
def export_shira(model: Model, adapter: Adapter, output: Output, dtype: Dtype = None, debug: Debug = False) -> None:
    """Write an adapter as a SHiRA of PEFT's format, exactly, where its layers have room for it."""
    with reported(err, debug):
        from s2ft_compile.exporters import save_shira

        with err.status("converting"):
            save_shira(_base(model, adapter, dtype), output, adapter=adapter_folder(adapter))
        out.print(f"SHiRA: {output}")


@export_app.command("custom")
def export_custom(
    name: Annotated[str, typer.Argument(help="A registered exporter's; `s2ft --import FILE export custom NAME ...`.")],
    model: Model,
    output: Output,
    adapter: Annotated[Path | None, typer.Option("--adapter", help=ADAPTER)] = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Write with an exporter of your own (`s2ft_compile.exporters.exporter`)."""
    with reported(err, debug):
        from s2ft_compile.config import check_choice
        from s2ft_compile.exporters.registration import REGISTERED

        check_choice("exporter", name, tuple(REGISTERED))
        with err.status(f"writing {name}"):
            REGISTERED[name](_adapted(model, adapter, dtype), output)
        out.print(f"{name}: {output}")


def _export_separate(
    model: str, output: Path, adapter: Path | None, dtype: str | None, options: dict, names: dict
) -> None:
    from s2ft_compile.exporters import export_onnx, save_onnx_adapter

    from .data import example_inputs

    if adapter is None:
        raise ConfigError("--separate makes room for an adapter; name it with --adapter")
    folder, file = adapter_folder(adapter), output.with_suffix(".onnx_adapter")
    with err.status("exporting"):
        base = _base(model, adapter, dtype)
        save_onnx_adapter(base, file, adapter=folder, **names)
        try:
            export_onnx(base, output, example_inputs(base), [folder], **options)
        except BaseException:
            file.unlink()
            raise
    out.print(f"ONNX model: {output}, adapter: {file}")


def _adapted(model: str, adapter: Path | None, dtype: str | None):
    """The base model, with the adapter in its weights where there is one."""
    from s2ft_compile.exporters import load_adapter

    from .data import load_model

    if adapter is None:
        return load_model(model, dtype or "auto")
    folder, loaded = adapter_folder(adapter), _base(model, adapter, dtype)
    load_adapter(loaded, folder)
    return loaded


def _base(model: str, adapter: Path, dtype: str | None):
    """The base model as the training run that left the adapter loaded it: an adapter fits those weights only."""
    from .data import load_model

    try:
        options = json.loads((adapter / "metrics.json").read_text())["options"]
        trained, quantize = options["dtype"], options.get("quantize", "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        trained, quantize = "auto", "none"  # an adapter by itself does not say
    return load_model(model, dtype or trained, quantize)


def _save_beside(tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files into a folder that holds others; what is there stays as it is."""
    from s2ft_compile.exporters.files import new_files

    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        names = [file.name for file in Path(temporary).iterdir() if not (folder / file.name).exists()]
        with new_files(*(folder / name for name in names)) as work:
            for name in names:
                shutil.copyfile(Path(temporary) / name, work / name)


def _tokenizer(model: str):
    """The model's tokenizer, or None for one that has none."""
    from .data import load_tokenizer

    try:
        return load_tokenizer(model)
    except ConfigError as error:
        err.print(f"[yellow]{error}; the folder will have no tokenizer[/]")
        return None
