"""The command line, `s2ft`: a function for each command, which imports what it needs inside."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from s2ft_compile.config import (
    BUDGETS,
    CALIBRATED,
    CHANNELS,
    HEADS,
    ROLES,
    SELECTIONS,
    SHARE,
    CompileOptions,
    S2FTConfig,
)
from s2ft_compile.errors import ConfigError

from .arguments import ADAPTER, Debug, adapter_folder, err, out
from .export import export_app
from .terminal import reported

app = typer.Typer(
    help="Fine-tune a few dense slices of a transformer's weights (S²FT) and get an ordinary model back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(export_app, name="export")


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


CHECKPOINTING = "Keep the input of each layer alone, and compute it again in the backward: by default if quantized."
FP8 = "Multiply in fp8 too, forward and for dX: a base with --quantize fp8, a GPU of capability 8.9 or more."
BUDGET = "Share of the activations kept for the backward; what is not kept is computed again."


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
            inputs = example_inputs(loaded)
            facts = describe(loaded, inputs, analyze(loaded, inputs))
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
    selections: Annotated[
        int, typer.Option(help="How often units are chosen in the run: those of before lie beside quantized weights.")
    ] = 1,
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
            saving = quantize, optimizer, gradient_checkpointing, grad_accum, selections
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
            help=f"What trains: ROLE=RATIO or ROLE=UNITS, by commas. Roles: {', '.join(HEADS)}, each of these with "
            f"{CHANNELS} behind it, {', '.join(r for r in ROLES if not r.startswith(HEADS))}; or globs; or "
            f"`default`, {SHARE:g} of every role, more of heads. [default: default]"
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
    calibration_batches: Annotated[
        int | None,
        typer.Option(help="Batches of the data that a selection looks at. [default: 4 for the first, then 1]"),
    ] = None,
    reselect_every: Annotated[
        float | None,
        typer.Option(
            help="Steps, or below 1 a share of them, after which other units train; 0: never. "
            "[default: a tenth of the run, at least 20; 0 with --quantize, or a --budget of the whole model]"
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
        from .options import RUN, TrainOptions, check_begun, layered, parse_targets
        from .train import report
        from .train import train as run

        values = layered(ctx, config, output / RUN if resume and output and (output / RUN).is_file() else None)
        for name in ("data", "output"):
            values[name] = values[name] and Path(values[name])
        if resume and values["output"]:
            check_begun(values["output"])
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
    limit: Annotated[float, typer.Option(help="The share of a matrix's rows or columns that may have changed.")] = 0.5,
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


if __name__ == "__main__":
    app()
