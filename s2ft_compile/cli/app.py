"""The command line, `s2ft`: a function for each command, which imports what it needs inside."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from s2ft_compile.config import BUDGETS, CALIBRATED, ROLES, SELECTIONS, SHARE, CompileOptions, S2FTConfig
from s2ft_compile.errors import AdapterError, ConfigError

from .terminal import reported

app = typer.Typer(
    help="Fine-tune a few dense slices of a transformer's weights (S²FT) and get an ordinary model back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
export_app = typer.Typer(
    help="Turn a base model and an adapter into files that other programs run.", no_args_is_help=True
)
app.add_typer(export_app, name="export")

out, err = Console(), Console(stderr=True)


@app.callback()
def main(
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="A module or .py file with rules, selections or exporters; may be repeated."),
    ] = None,
) -> None:
    if imports:
        from .plugins import import_plugin

        with reported(err, debug=False):
            for name in imports:
                import_plugin(name)


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[str, typer.Option("--model", help="The base model: a Hugging Face folder, or a hub id.")]
CHECKPOINTING = "Keep the input of each layer alone, and compute it again in the backward: by default if quantized."
FP8 = "Multiply in fp8 too, forward and for dX: a base with --quantize fp8, a GPU of capability 8.9 or more."
BUDGET = "Share of the activations kept for the backward; what is not kept is computed again."
ADAPTER = "An adapter folder, or the output folder of `s2ft train`."
Adapter = Annotated[Path, typer.Option("--adapter", help=ADAPTER)]
Output = Annotated[Path, typer.Option("--output", help="The folder to write; must not exist yet.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of the weights: auto, float32, bfloat16 or float16. [default: the training run's]"),
]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with a map of layers and units.")] = None,
    debug: Debug = False,
) -> None:
    """Show a model's coupled structures: which roles can train, their units, and what was refused and why.

    No weights are read, so a model of any size can be looked at.
    """
    with reported(err, debug):
        from s2ft_compile.exporters.files import new_files
        from s2ft_compile.preparation import analyze

        from .data import example_inputs, load_structure
        from .inspect import describe, page, tables

        with err.status(f"tracing {model}"):
            loaded = load_structure(model)
            facts = describe(loaded, analyze(loaded, example_inputs(loaded)))
        if html:
            with new_files(html) as folder:
                (folder / html.name).write_text(page(facts), encoding="utf-8")
        if as_json:
            print(json.dumps(facts, indent=2))
        else:
            out.print(*tables(facts), sep="\n")


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a hub id.")],
    batch: Annotated[int, typer.Option(help="Sequences in a forward.")] = 4,
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    grad_accum: Annotated[int, typer.Option(help="Forwards in an optimizer step.")] = 1,
    targets: Annotated[str | None, typer.Option(help="What trains, as for `s2ft train`.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto (the configuration's), or float32, bfloat16, float16.")
    ] = "auto",
    quantize: Annotated[str, typer.Option(help="As for `s2ft train`: nf4, int8 or fp8.")] = "none",
    fp8: Annotated[bool, typer.Option("--fp8", help=FP8)] = False,
    optimizer: Annotated[str, typer.Option(help="As for `s2ft train`: muon or adamw.")] = "muon",
    activation_budget: Annotated[float, typer.Option(help=BUDGET)] = 1.0,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help=CHECKPOINTING, show_default=False)] = None,
    logits: Annotated[bool, typer.Option(help="Whether a step returns its logits; `s2ft train` does not.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print bytes as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Predict the memory of a training step. No weights are read, and nothing runs."""
    with reported(err, debug):
        from .estimate import estimate_folder, table
        from .options import parse_targets

        how = CompileOptions(activation_budget=activation_budget, logits=logits, fp8=fp8)
        with err.status(f"compiling {model} without weights"):
            what = S2FTConfig(parse_targets(targets))
            saving = quantize, optimizer, gradient_checkpointing, grad_accum
            estimated = estimate_folder(model, batch, seq, dtype, what, how, *saving)
        if as_json:
            print(json.dumps({**asdict(estimated), "total": estimated.total}))
        else:
            out.print(table(estimated))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a hub id.")],
    batch: Annotated[int, typer.Option(help="Sequences in a forward.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 16,
    targets: Annotated[str | None, typer.Option(help="What trains, as for `s2ft train`.")] = None,
    logits: Annotated[bool, typer.Option(help="Whether a step returns its logits; `s2ft train` does not.")] = False,
    off: Annotated[list[str] | None, typer.Option(help="A pass to leave out; may be repeated.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A folder for every graph before and after each pass.")] = None,
    debug: Debug = False,
) -> None:
    """Show what each pass of the compiler changes, and which gradients and axes stay as they are, and why.

    No weights are read, and nothing runs.
    """
    with reported(err, debug):
        from s2ft_compile.explanation import explain as run

        from .estimate import structure_and_step
        from .options import parse_targets

        how = CompileOptions(logits=logits, off=off or (), trace=trace)
        with err.status(f"compiling {model} without weights"):
            loaded, inputs = structure_and_step(model, batch, seq, "auto")
            explained = run(loaded, inputs, S2FTConfig(parse_targets(targets)), how)
        out.print(str(explained), highlight=False, soft_wrap=True, markup=False)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a hub id.")],
    seed: Annotated[int, typer.Option(help="Of the permutations.")] = 0,
    debug: Debug = False,
) -> None:
    """Permute every coupling of a model at once, at random, and compare its outputs: exit status 1 if they change."""
    with reported(err, debug):
        from s2ft_compile.preparation import analyze
        from s2ft_compile.verification import verify as run

        from .data import example_inputs, load_model

        with err.status(f"tracing and permuting {model}"):
            loaded = load_model(model)
            inputs = example_inputs(loaded)
            verified = run(loaded, inputs, analyze(loaded, inputs), seed)
        out.print(str(verified), highlight=False, soft_wrap=True, markup=False)
        if not verified.ok:
            raise typer.Exit(1)


@app.command()
def train(
    ctx: typer.Context,
    model: Annotated[str, typer.Option("--model", help="The base model: a Hugging Face folder, or a hub id.")] = "",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Plain text; JSON lines, a JSON array, CSV or parquet with `text`, `prompt`/`completion`, `messages`, "
            "`instruction`/`output` or `conversations` in every row; or a hub data set, OWNER/NAME[:SPLIT].",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="The folder to write; must not exist yet, but for --resume.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file of these options; what is typed wins.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT, with its options.")
    ] = False,
    targets: Annotated[
        str | None,
        typer.Option(
            help=f"What trains: ROLE=RATIO or ROLE=UNITS, by commas. Roles: {', '.join(ROLES)}; or globs. "
            f"[default: {SHARE:g} of all channels, and of the heads' queries and keys]"
        ),
    ] = None,
    selection: Annotated[
        str,
        typer.Option(help=f"How units are ranked: {', '.join(SELECTIONS)}; {', '.join(CALIBRATED)} look at the data."),
    ] = "gradient",
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Take the lowest-ranked units rather than the highest.")
    ] = False,
    budget: Annotated[
        str,
        typer.Option(
            help=f"{BUDGETS[0]}: as many units in each layer; over the whole model, {BUDGETS[1]}: the best "
            f"units, {BUDGETS[2]}: layers get units by their scores."
        ),
    ] = "layer",
    top_layers: Annotated[
        int | None, typer.Option(help="Train the last N layers only; the backward stops there. [default: all]")
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="An adapter of which nothing may train again, to fuse both; may be repeated. " + ADAPTER),
    ] = None,
    calibration_batches: Annotated[int, typer.Option(help="Batches of the data that a selection looks at.")] = 4,
    reselect_every: Annotated[
        float | None,
        typer.Option(
            help="Steps, or below 1 a share of them, after which other units train; 0: never. "
            "[default: a tenth of the run, at least 20]"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. [default: one pass over the data]")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data, where --steps is not given.")] = 1.0,
    optimizer: Annotated[str, typer.Option(help="muon (for slices that are matrices), or adamw.")] = "muon",
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate, after the warm-up. [default: by the model's width and the steps]"),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Of the rate: cosine, linear, constant or constant_with_warmup.")
    ] = "cosine",
    warmup: Annotated[
        float | None, typer.Option(help="Steps, or below 1 a share of them. [default: a tenth, at most 10]")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Pulls the weights towards the base model's.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradients; 0: any.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence, at most.")] = 512,
    grad_accum: Annotated[int, typer.Option(help="Forwards in an optimizer step.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the selection and the order of the data.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    quantize: Annotated[
        str, typer.Option(help="Quantize the frozen linear layers while they are loaded: nf4, int8 or fp8.")
    ] = "none",
    fp8: Annotated[bool, typer.Option("--fp8", help=FP8)] = False,
    inner: Annotated[
        str, typer.Option(help="What compiles the rewritten graph: inductor, aot_eager or eager.")
    ] = "inductor",
    activation_budget: Annotated[float, typer.Option(help=BUDGET)] = 1.0,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help=CHECKPOINTING, show_default=False)] = None,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer", help="Compile one layer for all that are alike: depth does not slow the first step."
        ),
    ] = False,
    held_out: Annotated[float, typer.Option(help="Share of the data that is only measured, before and after.")] = 0.05,
    packing: Annotated[bool, typer.Option("--packing", help="Several examples in a block, each for itself.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints (of the slices; they are small).")] = 200,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep: the last ones, and the best.")] = 2,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between measurements of what is held out. [default: none]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="End after N measurements that are no better, with the best. [default: do not]")
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="none, tensorboard or wandb; OUTPUT/log.jsonl is always written.")
    ] = "none",
    debug: Debug = False,
) -> None:
    """Fine-tune a causal language model; leaves OUTPUT/adapter, merged, metrics.json, log.jsonl and checkpoints.

    Ctrl-C ends the step and writes a checkpoint, from which --resume goes on.

    Example: s2ft train --model ./llama --data notes.txt --output run --targets
    ffn.in=0.02,ffn.out=0.02,attention.out=0.05
    """
    with reported(err, debug):
        from .options import RUN, TrainOptions, layered, parse_targets
        from .train import report
        from .train import train as run

        values = layered(ctx, config, output / RUN if resume and output and (output / RUN).is_file() else None)
        for name in ("data", "output"):
            values[name] = values[name] and Path(values[name])
        missing = [f"--{name}" for name in ("model", "data", "output") if not values[name]]
        if missing:
            raise ConfigError(f"{', '.join(missing)} is missing: type it, or write it into the file of --config")
        given = {name: value for name, value in values.items() if name != "debug"}
        names = ("targets", "selection", "smallest", "budget", "top_layers", "exclude")
        targets, selection, smallest, budget, top_layers, exclude = (values.pop(name) for name in names)
        folders = [adapter_folder(Path(path)) for path in exclude or ()]
        s2ft = S2FTConfig(parse_targets(targets), selection, not smallest, budget, values["seed"], top_layers, folders)
        rest = {name: value for name, value in values.items() if name not in ("config", "debug")}
        out.print(report(run(TrainOptions(s2ft=s2ft, given=given, **rest), out), values["output"]))


@app.command("report")
def report_runs(
    runs: Annotated[list[Path], typer.Argument(help="The output folders of `s2ft train`, to show side by side.")],
    output: Annotated[Path, typer.Option("--output", help="The page to write, or a picture of it.")] = Path(
        "report.html"
    ),
    debug: Debug = False,
) -> None:
    """Write a page (.html) or a picture (.png, .svg, .pdf) of what runs learned, how fast, and which units moved."""
    with reported(err, debug):
        from s2ft_compile.config import check_choice
        from s2ft_compile.exporters.files import new_files

        from .report import figure, page, read_runs

        check_choice("kind of file", output.suffix, (".html", ".png", ".svg", ".pdf"))
        shown = read_runs(runs)
        with err.status("drawing"), new_files(output) as folder:
            if output.suffix == ".html":
                (folder / output.name).write_text(page(shown), encoding="utf-8")
            else:
                figure(shown).savefig(folder / output.name, dpi=160)
        out.print(f"report: {output}")


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
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Write an adapter as a LoRA of PEFT's format, exactly; PEFT, vLLM and llama.cpp load it."""
    with reported(err, debug):
        from s2ft_compile.exporters import save_lora

        with err.status("converting"):
            base = _base(model, adapter, dtype)
            number = int(ranks) if ranks.isdecimal() else ranks
            save_lora(base, output, layout, number, adapter=adapter_folder(adapter), truncate=truncate)
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


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The base model: a folder of safetensors, or a hub id.")],
    adapters: Annotated[list[Path], typer.Argument(help=ADAPTER)],
    output: Annotated[Path, typer.Argument(help="The folder to write; must not exist yet.")],
    weights: Annotated[
        str | None, typer.Option(help="A factor for each adapter, by commas: 1,0.5. Without: 1 for each.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Add adapters to a checkpoint on disk, tensor by tensor, without building the model."""
    with reported(err, debug):
        from s2ft_compile.exporters import merge_checkpoint

        with err.status("merging"):
            folders = [adapter_folder(path) for path in adapters]
            merge_checkpoint(_checkpoint_folder(base), folders, output, _numbers(weights))
        out.print(f"merged checkpoint: {output}")


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The base model: a folder of safetensors, or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The same, trained in place: a folder of safetensors, or a hub id.")],
    output: Annotated[Path, typer.Argument(help="The adapter folder to write; must not exist yet.")],
    limit: Annotated[float, typer.Option(help="The share of a tensor's rows or columns that may have changed.")] = 0.5,
    debug: Debug = False,
) -> None:
    """Recover an adapter from two checkpoints that differ in a few rows or columns of each weight."""
    with reported(err, debug):
        from s2ft_compile.adapters.format import read_adapter
        from s2ft_compile.exporters import extract as run

        with err.status("comparing"):
            run(_checkpoint_folder(base), _checkpoint_folder(tuned), output, limit)
        slices = read_adapter(output).slices
        numbers = sum(s.delta.numel() for s in slices)
        out.print(f"adapter: {output}, {len(slices)} slices, {numbers:,} numbers")


@app.command()
def serve(
    base: Annotated[str, typer.Argument(help="The base model: a Hugging Face folder, or a hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: requests ask for it with model=NAME; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the base model. [default: its folder's]")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes one that is free.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="S2FT_API_KEY", help="What requests have to bring.")] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Let requests add adapters under this folder, and remove them.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a request. [default: the model's]")] = None,
    max_requests: Annotated[int, typer.Option(help="Requests under way, running and waiting.")] = 256,
    max_batch: Annotated[int, typer.Option(help="Requests that run in one batch.")] = 64,
    cache_tokens: Annotated[int, typer.Option(help="Tokens in the cache of keys and values, on a CPU.")] = 1 << 15,
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[str, typer.Option(help="As the adapters were trained: nf4, int8 or fp8.")] = "none",
    debug: Debug = False,
) -> None:
    """Serve a causal language model and adapters of it over HTTP, as OpenAI's API; adapters are mixed in one batch."""
    with reported(err, debug):
        from .serve import run

        limits = dict(length=max_length, requests=max_requests, batch=max_batch, cache=cache_tokens)
        run(base, adapter or [], name, host, port, api_key, adapter_root, limits, dtype, quantize, err)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", help="The demo's own folder; a previous demo in it is replaced.")
    ] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="Roughly how long to train altogether.")] = 1.75,
    debug: Debug = False,
) -> None:
    """Pretrain a small model, fine-tune it with S²FT, export it three ways, and compare them all."""
    with reported(err, debug):
        from .demo import run

        run(output, 60 * minutes, out)


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


def adapter_folder(path: Path) -> Path:
    """The adapter that `path` is, or that a training run left in it."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not folder.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise AdapterError(f"adapter folder {path} {what}; valid: an adapter, or the output of `s2ft train`")
    return folder


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights are numbers by commas, such as 1,0.5; got {text!r}") from None


def _checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint; that of a hub id is the one in the hub's cache, loaded where it is not there yet."""
    if Path(model).exists() or model.count("/") > 1 or model.startswith((".", "/")):
        return Path(model)
    from huggingface_hub import snapshot_download

    from s2ft_compile.exporters.onnx.check import first_line

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:  # its errors are these too: no such model, no connection, no such name
        raise ConfigError(f"{model} is no folder, and no hub id that can be reached: {first_line(error)}") from error


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


if __name__ == "__main__":
    app()
