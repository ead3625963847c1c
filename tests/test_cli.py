"""The command line on tiny models: what each command leaves behind, and one line for each bad input."""

import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_data import TEXT, lines, tiny_tokenizer
from typer.testing import CliRunner

import s2ft_compile as s2ft
from s2ft_compile import exporters
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.cli import inspect as summary
from s2ft_compile.cli import report
from s2ft_compile.cli.app import app
from s2ft_compile.cli.options import TrainOptions, parse_targets
from s2ft_compile.cli.terminal import reported
from s2ft_compile.config import SELECTIONS
from s2ft_compile.errors import ConfigError, S2FTError
from s2ft_compile.exporters import registration
from s2ft_compile.passes.select.selections import SCORES


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("models") / "base", tiny_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(f"{i}: {TEXT}" for i in range(60)))
    return path


@pytest.fixture(scope="session")
def run(base, text, tmp_path_factory):
    """The output folder of one training run, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "deep" / "run"
    result = invoke(
        "train",
        "--model",
        base,
        "--data",
        text,
        "--output",
        output,
        "--targets",
        "ffn.out=0.5,attention.out=2",
        "--steps",
        8,
        "--lr",
        0.06,
        "--batch-size",
        2,
        "--seq-len",
        16,
        "--inner",
        "aot_eager",
    )
    assert result.exit_code == 0, result.output
    return output, result.output


def invoke(*arguments):
    torch._dynamo.reset()  # as if each command were a process of its own
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(*arguments) -> str:
    """The error of a command that must fail with one line and no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    message = result.output.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("error: "), result.output
    return message[0]


PLUGIN = """
from safetensors.torch import save_file
from s2ft_compile.exporters import exporter
from s2ft_compile.selections import selection

@selection("mine::last", needs="nothing")
def last(seed, key, units):
    ...

@exporter
def save_head(model, folder):
    save_file({"head": model.lm_head.weight.detach().clone()}, folder / "head.safetensors")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A user's file; what it registers is gone after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "my_plugin.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop("my_plugin", None)
    SELECTIONS.pop("mine::last"), SCORES.pop("mine::last")
    if registration.REGISTERED.pop("save_head", None):
        del exporters.save_head


def test_what_a_user_registers_is_imported_before_a_command(plugin, base, run, tmp_path):
    with_adapter = ("--model", base, "--adapter", run[0], "--output", tmp_path / "out")
    result = invoke("--import", plugin, "export", "custom", "save_head", *with_adapter)
    assert result.exit_code == 0, result.output
    assert torch.equal(load_file(tmp_path / "out" / "head.safetensors")["head"], load(run[0] / "merged").lm_head.weight)
    assert SELECTIONS["mine::last"] == "nothing"
    assert "unknown exporter 'save_tail'; valid: save_head" in refused("export", "custom", "save_tail", *with_adapter)


@pytest.mark.parametrize(
    "name, message",
    [("none.py", "none.py is no file"), ("no_such_module", "No module named"), ("bad.py", "SyntaxError")],
)
def test_what_cannot_be_imported_is_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "bad.py").write_text("def")
    monkeypatch.chdir(tmp_path)
    assert message in refused("--import", name, "inspect", "model")


def test_runs_are_reported_on_one_page(run, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke("report", run[0], run[0], "--output", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    page, metrics = (tmp_path / "out.html").read_text(), json.loads((run[0] / "metrics.json").read_text())
    assert f"{metrics['loss_before']:.4f} → {metrics['loss_after']:.4f}" in page
    assert page.count("model.layers.1.mlp.down_proj.weight") == 2 and page.count("<svg") == 1
    assert set(re.findall(r'(?:src|href)="(.)', page)) <= {"#", "d"}, "what it shows is in it"
    assert invoke("report", run[0], "--output", tmp_path / "out.png").exit_code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_reported_is_one_line(run, base, tmp_path):
    assert f"{base} is no finished run of `s2ft train`: metrics.json is missing" in refused("report", base)
    assert "unknown kind of file '.doc'; valid: .html" in refused("report", run[0], "--output", tmp_path / "out.doc")
    (tmp_path / "out.html").write_text("mine")
    assert "exists" in refused("report", run[0], "--output", tmp_path / "out.html")


def test_a_map_of_what_moved_adds_up(run):
    adapter = read_adapter(run[0] / "adapter")
    maps = report.moved(adapter)
    assert {role: tuple(norms.shape) for role, norms in maps.items()} == {"ffn.out": (2, 48), "attention.out": (2, 32)}
    for role, norms in maps.items():
        deltas = [s.delta for s in adapter.slices if s.roles == (role,)]
        assert norms.square().sum().item() == pytest.approx(sum(d.double().square().sum().item() for d in deltas))
        trained = {int(i) for s in adapter.slices if s.roles == (role,) for i in s.indices}
        assert set(norms.sum(0).nonzero().flatten().tolist()) <= trained


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


# explain


def test_explain_shows_passes_and_reasons_and_leaves_a_trace(base, tmp_path):
    result = invoke("explain", base, "--targets", "ffn.out=2", "--off", "lower", "--trace", tmp_path / "trace")
    assert result.exit_code == 0, result.output
    for expected in ("slice_pushdown: 8 operators changed", "cannot be sliced", "rows are looked up by index"):
        assert expected in result.output
    assert len(list((tmp_path / "trace").glob("*-slice_pushdown.after.txt"))) == 1
    assert not list((tmp_path / "trace").glob("*-lower.*"))
    assert "there is no pass 'lowered' to be off; valid: recheck" in refused("explain", base, "--off", "lowered")


# inspect


def test_inspect_prints_tables(base):
    result = invoke("inspect", base)
    assert result.exit_code == 0, result.output
    for expected in (
        "LlamaForCausalLM",
        "mlp.down_proj.weight[1]",
        "0-1",
        "ffn.out",
        "attention.value",
        "embed_tokens",
    ):
        assert expected in result.output


def test_inspect_json_adds_up(base):
    facts = json.loads(invoke("inspect", base, "--json").stdout)
    model = load(base)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    down = sum(p.numel() for n, p in model.named_parameters() if "down_proj" in n)
    assert facts["targets"]["ffn.out"] == {
        "weights": 2,
        "parameters": down,
        "share": down / facts["parameters"],
        "units": [48, 48],
        "default": [1, 1],
    }
    ffn = [c for c in facts["couplings"] if c["role"] == "ffn"]
    assert [(c["layer"], c["units"]) for c in ffn] == [(0, 48), (1, 48)]
    assert all(r["reason"] for r in facts["refusals"])


def test_inspect_needs_no_weights(base, tmp_path):
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert json.loads(invoke("inspect", tmp_path, "--json").stdout) == json.loads(
        invoke("inspect", base, "--json").stdout
    )


def test_inspect_writes_a_page_that_needs_no_network(base, tmp_path):
    page = tmp_path / "page.html"
    invoke("inspect", base, "--html", page)
    text = page.read_text()
    held = text.split('<script type="application/json" id="facts">')[1].split("</script>")[0]
    assert json.loads(held) == json.loads(invoke("inspect", base, "--json").stdout)
    assert "http" not in text and "src=" not in text and "href=" not in text
    assert "exists" in refused("inspect", base, "--html", page)


def test_a_name_cannot_end_the_page_s_script():
    facts = {"model": "</script><script>alert(1)", "couplings": [], "refusals": []}
    assert "</script><script>" not in summary.page(facts)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        self.register_buffer("scale", torch.arange(6.0))

    def forward(self, x):
        return x + self.down(self.up(x).relu() * self.scale)


def test_inspect_shows_a_reason_that_layers_share_once():
    model, x = torch.nn.Sequential(Scaled(), Scaled(), Scaled()), (torch.ones(2, 4),)
    model = torch.nn.Sequential(model, torch.nn.Linear(4, 4))
    refusals = summary.tables(summary.describe(model, x, s2ft.analyze(model, x)))[2]
    rows = list(zip(*(list(column.cells) for column in refusals.columns)))
    of_scales = [row for row in rows if "scale" in row[3]]
    assert [(row[0], row[1], row[3]) for row in of_scales] == [
        ("0.0-2", "6", "it meets 0.*.scale, which varies along it")
    ]


def test_inspect_refuses_what_is_no_model(tmp_path):
    assert "config.json is missing (found: nothing)" in refused("inspect", tmp_path)
    assert "no model could be loaded from" in refused("inspect", "nobody/nothing")


def test_debug_shows_the_traceback(tmp_path):
    result = invoke("inspect", tmp_path, "--debug")
    assert isinstance(result.exception, ConfigError)


def full_disk_of_torch():
    """torch.save leaves a RuntimeError of its own behind, whose text is a place in its source."""
    with open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(1 << 16)}, file)


def full_disk_of_safetensors():
    save_file({"a": torch.zeros(4)}, "/dev/full/a")


def full_disk_in_a_backend():
    def backend(graph, inputs):
        Path("/dev/full").write_text("a trace")

    torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("act", [full_disk_of_torch, full_disk_of_safetensors, full_disk_in_a_backend])
def test_an_error_of_the_system_is_one_line_whoever_raises_it(act):
    console = Console(file=io.StringIO(), width=10_000)
    with pytest.raises(typer.Exit), reported(console, debug=False):
        act()
    assert "error: " in console.file.getvalue() and "Traceback" not in console.file.getvalue()
    with pytest.raises(KeyError), reported(console, debug=False):
        raise KeyError("a mistake of ours keeps its traceback")


# train


COMPLETE = ["adapter", "checkpoints", "log.jsonl", "merged", "metrics.json", "plan.json", "run.json"]


def test_train_leaves_a_complete_folder(run):
    output, printed = run
    assert sorted(p.name for p in output.iterdir()) == COMPLETE
    assert [p.name for p in output.parent.iterdir()] == ["run"]  # nothing temporary is left
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["loss_after"] < metrics["loss_before"] - 0.1
    assert metrics["steps"] == 8 and metrics["tokens_per_step"] == 32
    assert metrics["trainable_parameters"] == 2 * (24 * 32 + 2 * 8 * 32)
    assert metrics["trainable_fraction"] == metrics["trainable_parameters"] / metrics["parameters"]
    assert f"{metrics['loss_after']:.4f}" in printed and "merged model" in printed


def test_train_changes_only_what_was_selected(run, base):
    before, after = dict(load(base).named_parameters()), dict(load(run[0] / "merged").named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.endswith(("down_proj.weight", "o_proj.weight"))}
    down = before["model.layers.0.mlp.down_proj.weight"] != after["model.layers.0.mlp.down_proj.weight"]
    assert down.any(0).sum() == 24


def test_the_merged_folder_has_the_tokenizer_and_the_measured_loss(run, text):
    from transformers import AutoTokenizer

    from s2ft_compile.cli.data import split, tokenize
    from s2ft_compile.cli.fit import loss
    from s2ft_compile.cli.records import read_records

    output, _ = run
    tokenizer = AutoTokenizer.from_pretrained(output / "merged")
    _, held_out = split(tokenize(read_records(text), tokenizer, 16), 0.05, 0, shuffle=False)
    expected = json.loads((output / "metrics.json").read_text())["loss_after"]
    assert loss(load(output / "merged"), held_out, 2) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("row", [{"text": TEXT * 3}, {"prompt": "the quick", "completion": " brown fox"}])
def test_train_takes_jsonl_and_its_options(base, tmp_path, row):
    data = lines(tmp_path / "data.jsonl", *[row] * 8)
    result = invoke(
        "train",
        "--model",
        base,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--targets",
        "*.up_proj.weight=3",
        "--selection",
        "weight",
        "--smallest",
        "--steps",
        2,
        "--batch-size",
        2,
        "--seq-len",
        16,
        "--grad-accum",
        2,
        "--dtype",
        "bfloat16",
        "--inner",
        "eager",
        "--seed",
        7,
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["options"]["s2ft"]["largest"] is False and metrics["options"]["dtype"] == "bfloat16"
    assert metrics["trainable_parameters"] == 2 * 3 * 32
    assert next(load(tmp_path / "run" / "merged").parameters()).dtype == torch.bfloat16
    exported = invoke(
        "export", "merged", "--model", base, "--adapter", tmp_path / "run", "--output", tmp_path / "again"
    )
    assert exported.exit_code == 0, exported.output  # in the run's type, or the fingerprint would not fit


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": "{tmp}/none"}, "none does not exist; valid: a Hugging Face folder"),
        ({"--model": "none/at all"}, "no model could be loaded"),
        ({"--model": "{tmp}"}, "config.json is missing"),
        ({"--data": "{tmp}/none.txt"}, "does not exist; valid"),
        ({"--data": "{tmp}/bad.jsonl"}, "bad.jsonl, line 2: not JSON"),
        ({"--output": "{tmp}"}, "exists and is not empty"),
        ({"--output": "{tmp}/bad.jsonl"}, "exists and is a file"),
        ({"--targets": "ffn.oot=0.1"}, "unknown target 'ffn.oot': neither a role (attention.out"),
        ({"--targets": "ffn.out"}, "not of the form ROLE=AMOUNT"),
        ({"--targets": "ffn.out=many"}, "'many' is no amount"),
        ({"--targets": "ffn.out=1.5"}, "a ratio lies in (0, 1]"),
        ({"--targets": "ffn.out=0"}, "a number of units is at least 1"),
        ({"--targets": "ffn.out=49"}, "use 1 to 48"),
        ({"--selection": "best"}, "unknown selection 'best'; valid: random, weight"),
        ({"--budget": "all"}, "unknown budget 'all'"),
        ({"--budget": "score", "--selection": "random"}, "budget 'score' shares units out by their scores"),
        ({"--top-layers": 3}, "top_layers = 3, but target 'attention.query' has 2 layers"),
        ({"--exclude": "{tmp}/none"}, "none does not exist; valid: an adapter, or the output"),
        ({"--exclude": "{tmp}"}, "is not an adapter: it has no file adapter_config.json"),
        ({"--calibration-batches": 0}, "calibration_batches is at least 1"),
        ({"--inner": "tvm"}, "unknown inner backend 'tvm'"),
        ({"--dtype": "int8"}, "unknown dtype 'int8'"),
        ({"--steps": 0}, "steps is at least 1"),
        ({"--lr": -1}, "lr is a positive number"),
        ({"--seq-len": 100_000}, "less than two blocks of 100000"),
        ({"--batch-size": 10_000}, "less than one batch of 10000"),
        ({"--grad-accum": 10_000}, "less than one optimizer step of 10000"),
    ],
)
def test_train_refuses_with_one_line_and_leaves_nothing(base, text, tmp_path, change, message):
    lines(tmp_path / "bad.jsonl", {"text": "a"}, "{")
    options = {"--model": base, "--data": text, "--output": tmp_path / "run", "--seq-len": 16, **change}
    flat = [str(piece).replace("{tmp}", str(tmp_path)) for pair in options.items() for piece in pair]
    assert message in refused("train", *flat)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_train_leaves_the_units_of_an_excluded_adapter_alone(run, base, text, tmp_path):
    from s2ft_compile.adapters.format import read_adapter

    given = {
        "--model": base,
        "--data": text,
        "--output": tmp_path / "run",
        "--targets": "ffn.out=20,attention.out=2",
        "--steps": 1,
        "--batch-size": 2,
        "--seq-len": 16,
        "--inner": "eager",
        "--exclude": run[0],
    }
    result = invoke("train", *[piece for pair in given.items() for piece in pair])
    assert result.exit_code == 0, result.output
    first, second = read_adapter(run[0] / "adapter"), read_adapter(tmp_path / "run" / "adapter")
    assert second.plan.config.exclude == (str(run[0] / "adapter"),)
    for a, b in zip(first.slices, second.slices, strict=True):
        assert a.parameter_name == b.parameter_name and not torch.isin(a.indices, b.indices).any()


def test_a_selection_that_looks_at_data_looks_at_the_training_data(base, text, tmp_path):
    import s2ft_compile as s2ft
    from s2ft_compile.cli.data import example_inputs, split, tokenize
    from s2ft_compile.cli.records import read_records

    output, given = (
        tmp_path / "run",
        {
            "--model": base,
            "--data": text,
            "--output": tmp_path / "run",
            "--targets": "ffn.out=7",
            "--selection": "gradient",
            "--top-layers": 1,
            "--steps": 1,
            "--batch-size": 2,
            "--seq-len": 16,
            "--calibration-batches": 3,
            "--inner": "eager",
        },
    )
    result = invoke("train", *[piece for pair in given.items() for piece in pair])
    assert result.exit_code == 0, result.output
    before, after = dict(load(base).named_parameters()), dict(load(output / "merged").named_parameters())
    (name,) = [n for n in before if not torch.equal(before[n], after[n])]
    assert name == "model.layers.1.mlp.down_proj.weight"

    model, tokenizer = load(base), _tokenizer(base)
    training, _ = split(tokenize(read_records(text), tokenizer, 16), 0.05, 0, shuffle=False)
    spread = [training[[i * len(training) // 6 for i in pair]] for pair in ((0, 1), (2, 3), (4, 5))]
    config = s2ft.S2FTConfig(targets={"ffn.out": 7}, selection="gradient", top_layers=1)
    (expected,) = s2ft.prepare(model, example_inputs(model), config, calibration=spread).slices
    changed = (before[name] != after[name]).any(0).nonzero().flatten()
    assert changed.tolist() == sorted(expected.indices.tolist())


def test_train_refuses_a_model_that_is_no_causal_language_model(text, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    ).save_pretrained(tmp_path / "bert")
    message = refused("train", "--model", tmp_path / "bert", "--data", text, "--output", tmp_path / "run")
    assert "is a BertForMaskedLM" in message


def test_targets():
    assert parse_targets("ffn.out=0.03, attention.out=4") == {"ffn.out": 0.03, "attention.out": 4}
    assert [type(v) for v in parse_targets("ffn.out=1.0,ffn.in=1,a*[0-9]=b=1e-2".replace("b=", "")).values()] == [
        float,
        int,
        float,
    ]
    for wrong in ("", ",", "=1", "ffn.out=", "ffn.out=1,ffn.out=2", "ffn.out=nan"):
        with pytest.raises(S2FTError):
            TrainOptions("m", "d", "o", s2ft=_config(wrong))


def _config(targets):
    from s2ft_compile import S2FTConfig

    return S2FTConfig(targets=parse_targets(targets))


# export


def test_export_merged_equals_the_run(run, base, tmp_path):
    for adapter in (run[0], run[0] / "adapter"):
        output = tmp_path / f"merged-{adapter.name}"
        result = invoke("export", "merged", "--model", base, "--adapter", adapter, "--output", output)
        assert result.exit_code == 0, result.output
        expected = dict(load(run[0] / "merged").named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in load(output).named_parameters())
        assert (output / "tokenizer.json").is_file()


def test_export_adapter_copies_what_fits(run, base, tmp_path):
    result = invoke("export", "adapter", "--model", base, "--adapter", run[0], "--output", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "4 slices" in result.output
    files = {p.name: p.read_bytes() for p in (run[0] / "adapter").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}


def test_export_adapter_refuses_another_base_and_leaves_nothing(run, base, tmp_path):
    other = load(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    message = refused(
        "export", "adapter", "--model", tmp_path / "other", "--adapter", run[0], "--output", tmp_path / "out"
    )
    assert "fingerprint" in message or "another base" in message
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_export_onnx_equals_the_run(run, base, tmp_path):
    import onnxruntime

    path = tmp_path / "tuned.onnx"
    result = invoke("export", "onnx", "--model", base, "--adapter", run[0], "--output", path)
    assert result.exit_code == 0, result.output
    tokens = torch.randint(280, (3, 11), generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(["logits"], {"input_ids": tokens.numpy()})
    expected = load(run[0] / "merged")(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("command, output", [("merged", "out"), ("adapter", "out"), ("onnx", "out.onnx")])
def test_export_refuses_missing_adapters_and_taken_outputs(run, base, tmp_path, command, output):
    target = tmp_path / output
    assert "does not exist" in refused(
        "export", command, "--model", base, "--adapter", tmp_path / "none", "--output", target
    )
    assert "unknown dtype 'int8'" in refused(
        "export", command, "--model", base, "--adapter", run[0], "--output", target, "--dtype", "int8"
    )
    assert not any(tmp_path.iterdir())
    (target if command == "onnx" else tmp_path / "out" / "file").parent.mkdir(exist_ok=True)
    (target if command == "onnx" else target / "file").write_text("mine")
    assert "exists" in refused("export", command, "--model", base, "--adapter", run[0], "--output", target)
    assert (target if command == "onnx" else target / "file").read_text() == "mine"


def test_demo_keeps_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "no earlier demo" in refused("demo", "--output", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_what_torchao_cannot_load_is_said_where_it_matters(monkeypatch):
    with reported(Console(), debug=True):
        pass
    heard = logging.getLogger("torchao").filter
    gpus, cpus, other = (
        logging.makeLogRecord({"msg": text})
        for text in ("Failed to load /lib/_C_cutlass_90a.abi3.so", "Failed to load /lib/_C.abi3.so", "other")
    )
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert bool(heard(gpus)) is cuda and heard(cpus) and heard(other)


def test_help_names_the_roles_and_the_forms():
    assert "attention.value" in invoke("train", "--help").output
    assert "messages" in invoke("train", "--help").output
    for command in ("inspect", "train", "export", "demo"):
        assert command in invoke("--help").output
