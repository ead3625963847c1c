"""ONNX files: ONNX Runtime gives the merged model's outputs at sizes that were never traced."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import s2ft_compile as s2ft
from s2ft_compile.capture.models import tied_names
from s2ft_compile.errors import CaptureError, ExportError
from s2ft_compile.exporters import export_onnx
from s2ft_compile.exporters.onnx import export as exporter
from s2ft_compile.slices.state import merged, state_of

SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16, "intermediate_size": 24}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: BertModel(BertConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2)),
}
OUTPUTS = {"bert": ["last_hidden_state", "pooler_output"]}


def trained(model: nn.Module, example) -> nn.Module:
    s2ft.prepare(model, example, s2ft.S2FTConfig(targets={"ffn.out": 3}))
    with torch.no_grad():
        for delta in s2ft.parameters(model):
            delta.normal_()
    state_of(model).refresh()
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = bits(model)
    return after.keys() == before.keys() and all(
        t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in after.items()
    )


def run(path: Path, **inputs) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path))
    names = [o.name for o in session.get_outputs()]
    output = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, output, strict=True)}


def tokens(batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """The first row padded on the left: there it attends to nothing at all."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(0, 40, (batch, length)), "attention_mask": mask}


@pytest.mark.parametrize(
    "kind", [kind if kind in ("gpt2", "bert") else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_onnx_runtime_agrees_with_the_merged_model_at_other_sizes(tmp_path, capfd, kind):
    example = {name: t[:, :6] for name, t in tokens(1, 8).items()}  # views, as batches often are
    model = trained(MODELS[kind]().train(), example)
    before, modes, cache = bits(model), [m.training for m in model.modules()], model.config.use_cache
    capfd.readouterr()
    path = export_onnx(model, tmp_path / "new" / "model.onnx", example)
    assert "".join(capfd.readouterr()) == ""  # nothing on stdout or stderr
    assert path == tmp_path / "new" / "model.onnx"
    assert unchanged(model, before) and [m.training for m in model.modules()] == modes
    assert model.config.use_cache == cache
    with merged(model):
        plain = {name: tuple(p.shape) for name, p in model.named_parameters()}
        model.eval()
        for inputs in (example, tokens(2, 6), tokens(1, 1), tokens(3, 11, padding=5), tokens(5, 2, 1)):
            with torch.no_grad():
                expected = model(**inputs, use_cache=False)
            output = run(path, **inputs)
            assert list(output) == OUTPUTS.get(kind, ["logits"]) == list(expected.keys())
            for name, value in output.items():  # float32: 24 bits, sums of at most 40 terms, in few layers
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5 * scale)
    graph = onnx.load(path).graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    stored = {t.name: tuple(t.dims) for t in graph.initializer}
    # as a product takes it, (in, out), where it is of nothing else
    assert all(stored[n] in (shape, shape[::-1]) for n, shape in plain.items())
    read = {name for node in graph.node for name in node.input if node.op_type == "Transpose"}
    assert read & plain.keys() <= set(tied_names(model).values())
    assert all(np.prod(dims) <= 32 for n, dims in stored.items() if n not in plain)  # weights once
    assert not any(node.doc_string or node.metadata_props for node in graph.node)  # they would name files


class Tied(nn.Module):
    """Returns a mapping of nested results, some of them no tensors, one of them an input."""

    def __init__(self, d: int = 8, vocabulary: int = 11):
        super().__init__()
        self.embed, self.down = nn.Embedding(vocabulary, d), nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, scale=None, *, extra=()):
        x = self.embed(ids) + self.down(self.embed(ids))
        x = x if scale is None else x * scale[:, None, None]
        return {
            "logits": self.head(x),
            "none": None,
            "states": (x, [x.sum(1)]),
            "ids": ids,
            "scale": x.mean(1),
            "again": x,
        }


def test_names_of_nested_outputs_and_of_tied_weights(tmp_path):
    model, ids, scale = Tied(), torch.arange(4)[:, None], torch.arange(4.0)
    path = export_onnx(torch.compile(model, backend="eager"), tmp_path / "m.onnx", (ids, scale))
    ids, scale = torch.randint(0, 11, (3, 5)), torch.randn(3)
    output, expected = run(path, ids=ids, scale=scale), model(ids, scale)
    assert list(output) == ["logits", "states_0", "states_1_0", "ids_out", "scale_out", "again"]
    torch.testing.assert_close(output["logits"], expected["logits"])
    torch.testing.assert_close(output["again"], expected["again"])
    torch.testing.assert_close(output["states_1_0"], expected["states"][1][0])
    assert torch.equal(output["ids_out"], ids)
    torch.testing.assert_close(output["scale_out"], expected["scale"])
    stored = {t.name for t in onnx.load(path).graph.initializer}
    assert tied_names(model) == {"head.weight": "embed.weight"}
    assert "embed.weight" in stored and "head.weight" not in stored


def test_large_weights_lie_beside_the_file_and_bfloat16_is_widened(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(512, 600), nn.Linear(600, 3)).bfloat16()
    before = bits(model)
    path = export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 512).bfloat16(),))
    assert unchanged(model, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    weights = 4 * (512 * 600 + 600 + 600 * 3)  # bfloat16 is written as float32; a bias of 3 stays in the file
    assert path.stat().st_size < 20_000
    assert weights <= (tmp_path / "m.onnx.data").stat().st_size < weights + 20_000
    (tmp_path / "moved").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir("/")
    x = torch.randn(3, 512)
    output = run(tmp_path / "moved" / "m.onnx", input=x)["output"]
    with torch.no_grad():
        torch.testing.assert_close(output, model.float()(x), rtol=0, atol=1e-5)


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class Untranslatable(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Noisy(nn.Module):
    """A result that no graph can repeat."""

    def forward(self, x):
        return x + torch.rand(3)


def never(*_):
    raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    "make, error, match",
    [
        (Branching, CaptureError, "Branching could not be traced"),
        (Untranslatable, ExportError, "Untranslatable could not be translated to ONNX opset 20.*bessel_j0"),
        (Noisy, ExportError, "differs from the model in output 'output'"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, make, error, match):
    with pytest.raises(error, match=match):
        export_onnx(make(), tmp_path / "m.onnx", (torch.randn(2, 3),))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, match",
    [("m.onnx", "m.onnx exists"), ("m.onnx.data", "m.onnx.data exists"), ("m.bin", "use|m.onnx would be")],
)
def test_a_path_that_cannot_be_written_is_refused_before_tracing(tmp_path, monkeypatch, name, match):
    (tmp_path / name).write_text("kept")
    monkeypatch.setattr(exporter, "_traced", never)
    path = tmp_path / ("m.bin" if name == "m.bin" else "m.onnx")
    with pytest.raises(ExportError, match=match):
        export_onnx(nn.Linear(2, 2), path, (torch.randn(2, 2),))
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "kept"


def test_a_failure_half_way_restores_a_prepared_model(tmp_path, monkeypatch):
    class Ffn(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    def half(_, file):
        file.write_text("half")
        raise OSError("disk full")

    model = trained(Ffn().bfloat16().train(), (torch.randn(2, 4, dtype=torch.bfloat16),))
    before = bits(model)
    monkeypatch.setattr(exporter, "_translated", lambda *_: type("M", (), {"graph": None})())
    for name in ("name_values", "orient_weights"):
        monkeypatch.setattr(exporter, name, lambda *_: None)
    monkeypatch.setattr(exporter, "_write", half)
    with pytest.raises(ExportError, match="disk full"):
        export_onnx(model, tmp_path / "new" / "m.onnx", (torch.randn(2, 4, dtype=torch.bfloat16),))
    assert not list(tmp_path.iterdir()) and unchanged(model, before) and model.training


class Shows(nn.Module):
    """Gives out what quantizing would change: rows of an embedding, a weight turned over, a product with a bias."""

    def __init__(self):
        super().__init__()
        self.embed, self.down, self.up = nn.Embedding(11, 64), nn.Linear(64, 8), nn.Linear(64, 8, bias=False)

    def forward(self, ids):
        rows = self.embed(ids)
        return {
            "rows": rows,
            "turned": self.up.weight.T,
            "up": self.up(rows),
            "down": self.down(rows[:, 0]),
            "again": self.embed(ids) @ rows.transpose(1, 2),
        }


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_and_rows_that_are_outputs_stay_as_they_are(tmp_path, quantize):
    model, ids = Shows(), torch.randint(0, 11, (3, 5))
    path = export_onnx(model, tmp_path / "m.onnx", (ids[:2],), quantize=quantize)
    output, expected = run(path, ids=ids), model(ids)
    for name in ("rows", "turned", *(() if quantize else ("up", "down"))):
        torch.testing.assert_close(output[name], expected[name])
    for name in ("up", "down", "again"):
        assert (output[name] - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_a_batch_that_the_code_fixes_is_named(tmp_path, caplog):
    class Fixed(nn.Module):
        def forward(self, ids):
            return ids * torch.tensor([[1], [2]])

    with caplog.at_level(logging.WARNING):
        path = export_onnx(Fixed(), tmp_path / "m.onnx", (torch.arange(12).reshape(2, 6),))
    assert "fixes the batch of input ids to 2" in caplog.text and "sequence" not in caplog.text
    ids = torch.randint(0, 9, (2, 9))
    assert torch.equal(run(path, ids=ids)["output"], Fixed()(ids))
