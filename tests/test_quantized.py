"""Slices beside quantized weights: gradients as of dense training, a base that is never written, what comes out."""

import copy
import io
import json
import math
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from test_cli import base, invoke, text  # noqa: F401  (fixtures)
from test_estimate import peak_of
from test_exporters import files_of_at_most
from test_lower import Forced
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.adapters.fingerprint import fingerprint
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.adapters.stored import digest
from s2ft_compile.backend import boxed
from s2ft_compile.backend import s2ft as backend
from s2ft_compile.capture.capture import capture
from s2ft_compile.cli.data import checkpoint_layers, load_model
from s2ft_compile.cli.estimate import estimate_folder
from s2ft_compile.cli.options import TrainOptions
from s2ft_compile.cli.quantize import check_some, quantization
from s2ft_compile.errors import AdapterError, ConfigError, ExportError, StateError
from s2ft_compile.exporters import load_adapter, save_adapter, save_lora, save_merged, save_shira, unload_adapter
from s2ft_compile.exporters.checkpoint import merge_checkpoint
from s2ft_compile.exporters.extraction import extract
from s2ft_compile.exporters.onnx.weights import FORMS
from s2ft_compile.passes.select.calibrate import calibrate
from s2ft_compile.planned import plan_quantization
from s2ft_compile.quantized import (
    KINDS,
    Kind,
    Values,
    _dequantized,
    _in_rows,
    parts_of,
    quantized_in,
    register,
    same_parts,
)
from s2ft_compile.slices.blocks import Beside, InPlace, Trained, padded, room
from s2ft_compile.slices.state import Left, merged, state_of

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
STEP = {"input_ids": IDS, "labels": IDS}
TARGETS = {"ffn.in": 3, "ffn.out": 5, "attention.out": 1, "attention.query": 1}
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = transformers.LlamaConfig(**SIZES, **HEADS, use_cache=False)
DEEPER = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 3}, **HEADS, use_cache=False)
BIASED = transformers.Qwen2Config(**SIZES, **HEADS, use_cache=False)
CONFIGS = (LLAMA, DEEPER, BIASED)


def dense(config=LLAMA, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantized(kind: str, config=LLAMA, dtype=torch.float32) -> nn.Module:
    model = dense(config, dtype)
    quantize(model, QUANTIZE[kind])
    return model


def quantize(model: nn.Module, how) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name not in ("lm_head", "router"):
            path, _, key = name.rpartition(".")
            setattr(model.get_submodule(path), key, how(layer))


def _torchao(name: str, **options):
    def quantize(layer):
        ao = pytest.importorskip("torchao.quantization")
        held = nn.ModuleList([layer])
        ao.quantize_(held, getattr(ao, name)(**options))
        return held[0]

    return quantize


def _bitsandbytes(cls: str, **options):
    def quantize(layer):
        bnb = pytest.importorskip("bitsandbytes")
        replacement = getattr(bnb.nn, cls)(layer.in_features, layer.out_features, layer.bias is not None, **options)
        replacement.load_state_dict(layer.state_dict())
        return replacement.to(dtype=layer.weight.dtype).to("cpu") if cls == "Linear8bitLt" else replacement.to("cpu")

    return quantize


class Rounded(nn.Linear):
    """A way to quantize that no row knows: whole multiples of a scale, as integers."""

    @classmethod
    def of(cls, layer: nn.Linear) -> "Rounded":
        rounded = cls(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.detach().abs().max() / 127
        rounded.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        rounded.register_buffer("scale", scale)
        rounded.bias = layer.bias
        return rounded

    def values(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.values(), self.bias)


QUANTIZE = {
    "int8": _torchao("Int8WeightOnlyConfig"),
    "fp8": _torchao("Float8WeightOnlyConfig"),
    "int4 in bytes": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "nf4": _bitsandbytes("Linear4bit", quant_type="nf4", compress_statistics=False),
    "nf4 twice": _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "8 bits": _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "own": Rounded.of,
}
LIBRARIES = ("int8", "fp8", "int4 in bytes", "nf4", "nf4 twice", "8 bits")


@pytest.fixture(autouse=True)
def own_kind(monkeypatch):
    monkeypatch.setattr("s2ft_compile.quantized.KINDS", list(KINDS))
    is_own = lambda layer, key: isinstance(layer, Rounded) and key == "weight"  # noqa: E731
    register(Kind("own", is_own, lambda layer, key: layer.scale.dtype, lambda layer, key: layer.values()))


def prepared(kind: str, config=LLAMA, dtype=torch.float32, **more: float) -> nn.Module:
    """Prepared, with deltas that are not zero. more: targets besides `TARGETS`."""
    return copy.deepcopy(_prepared(kind, config.model_type, config.num_hidden_layers, dtype, tuple(more.items())))


@cache
def _prepared(kind: str, model_type: str, layers: int, dtype: torch.dtype, more: tuple) -> nn.Module:
    model = quantized(
        kind, next(c for c in CONFIGS if (c.model_type, c.num_hidden_layers) == (model_type, layers)), dtype
    )
    plan = s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({**TARGETS, **dict(more)}))
    generator = torch.Generator().manual_seed(1)
    for s in plan.slices:
        s.delta.data = 0.01 * torch.randn(s.delta.shape, generator=generator)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def oracle(model: nn.Module, config=LLAMA, dtype=torch.float64) -> nn.Module:
    """The dense model of dequantized weights and deltas, in float64, after a backward."""
    whole = dense(config).to(dtype)
    with s2ft.disabled(model):
        values = {name: w.detach().to(dtype).clone() for name, w in Values(model).items() if name in whole.state_dict()}
    for s in state_of(model).all_trained.slices:
        values[s.parameter_name].index_add_(s.dim, s.indices, s.delta.detach().to(dtype))
    whole.load_state_dict(values)
    whole(**STEP).loss.backward()
    return whole


def assert_gradients(model: nn.Module, config=LLAMA, u: float = 2.0**-24, dtype=torch.float64) -> None:
    """Against float64: sums of up to 128 terms through some 20 operators, each of which rounds to u."""
    full = dict(oracle(model, config, dtype).named_parameters())
    for s in state_of(model).plan.slices:
        expected = full[s.parameter_name].grad.index_select(s.dim, s.indices)
        error = (s.delta.grad.double() - expected).norm() / expected.norm()
        assert error <= 20 * 128**0.5 * u, f"{s.parameter_name}: {error:.2g}"


@pytest.mark.parametrize(
    "kind, config, dtype",
    [(kind, LLAMA, torch.float32) for kind in (*LIBRARIES, "own")]
    + [("nf4", BIASED, torch.bfloat16), ("int8", BIASED, torch.bfloat16)],
)
def test_gradients_of_dequantized_weights(kind, config, dtype):
    model = prepared(kind, config, dtype)
    blocks = state_of(model).blocks
    assert all(isinstance(block, Beside) for block in blocks) and not state_of(model).moves
    model.train()(**STEP).loss.backward()  # bitsandbytes' 8 bits round activations too in eval mode
    assert_gradients(model, config, 2.0**-24 if dtype == torch.float32 else 2.0**-9)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind, by_layer", [("int8", False), ("nf4 twice", True)])
def test_compiled_without_a_gradient_of_full_size(kind, by_layer):
    """Run as Inductor is given them, the graphs are right, and no product in them has the shape of a weight. Layers
    share graphs: the first is another, since no gradient goes into it."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs, **_):
        graphs.append(graph)
        return boxed(graph, inputs)

    model = prepared(kind, DEEPER if by_layer else LLAMA)
    kept = partial(backend, inner_compile=keep)
    for module in model.model.layers if by_layer else [model]:
        module.compile(backend=kept)
    for _ in range(2):  # gradients accumulate
        model(**STEP).loss.backward()
    for s in state_of(model).plan.slices:
        s.delta.grad /= 2
    assert_gradients(model, DEEPER if by_layer else LLAMA)
    nodes = [n for graph in graphs for n in graph.graph.nodes if n.target == torch.ops.aten.mm.default]
    shapes = {tuple(n.meta["val"].shape) for n in nodes}
    weights = {s.shape for s in state_of(model).plan.slices}
    assert len(graphs) == (4 if by_layer else 2) and not shapes & {*weights, *(shape[::-1] for shape in weights)}
    assert {tuple(s.delta.shape) for s in state_of(model).plan.slices} & shapes  # the gradients of slices are products


def test_int8_weights_of_odd_sizes_compiled_on_a_cpu():
    """A kernel that Inductor takes for them in bfloat16 reads past rows of 72 numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 72, bias=False), nn.SiLU(), nn.Linear(72, 64, bias=False)).bfloat16()
    quantize(model, QUANTIZE["int8"])
    x = torch.randn(1, 3, 64).bfloat16()
    s2ft.prepare(model, (x,), s2ft.S2FTConfig({"0.weight": 3}))
    with torch.no_grad():
        s2ft.parameters(model)[0].normal_(std=0.01)
        expected = model(x)
    y = torch.compile(model, backend="s2ft")(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * 2.0**-8 * float(expected.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="s2ft")(x), y, rtol=0, atol=0)


def test_gradients_beside_weights_become_kernels(monkeypatch):
    """As if there were a GPU, and no logits in chunks that show a graph to be one that trains."""
    forced, model = Forced(monkeypatch), prepared("nf4 twice", dtype=torch.bfloat16)
    model.train().compile(backend="s2ft", options={"inner": "aot_eager"})
    model(**STEP).loss.backward()
    assert sum(lowered for lowered, *_ in forced.graphs) == len(state_of(model).plan.slices)
    assert_gradients(model, LLAMA, 2.0**-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = prepared("nf4 twice", norm=1.0).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**STEP).loss.backward()
    assert_gradients(model)


WIDE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, **HEADS, "use_cache": False}


def bytes_of(model: nn.Module) -> int:
    """Of all weights, with everything that the quantized ones hold."""
    weights = quantized_in(model)
    held = [t for w in weights.values() for part in w.saved().values() for _, t in parts_of([("", part)])]
    held += [p for n, p in model.named_parameters() if n not in weights] + list(model.buffers())
    return sum(t.nbytes for t in {(t.data_ptr(), t.numel()): t for t in held}.values())


@pytest.mark.parametrize(
    "kind, layers",
    [("nf4", 2), *(pytest.param(k, n, marks=pytest.mark.slow) for k, n in (("int8", 2), ("int8", 5), ("fp8", 5)))],
)
def test_what_is_predicted_is_what_a_step_takes(kind, layers):
    """The weights, and the peak of a step as the allocator sees it, to 10%."""
    wide = transformers.LlamaConfig(**WIDE, num_hidden_layers=layers)
    ids = torch.randint(0, 2048, (2, 512))
    step_of, config = {"input_ids": ids, "labels": ids}, s2ft.S2FTConfig({"ffn.in": 0.02, "ffn.out": 0.02})
    with torch.device("meta"):
        planned = transformers.LlamaForCausalLM(wide)
    plan_quantization(planned, kind)
    model = quantized("nf4 twice" if kind == "nf4" else kind, wide).train()
    for each in (planned, model):
        checkpoint_layers(each)
    options = s2ft.CompileOptions(logits=False)
    predicted = s2ft.estimate(planned, step_of, config, options, "muon")
    numbers = sum(math.prod(w.shape) for w in quantized_in(model).values())
    assert bytes_of(model) == pytest.approx(predicted.weights, rel=0.02)
    assert kind != "nf4" or bytes_of(model) - 4 * 2 * 2048 * 256 <= 0.6 * numbers
    s2ft.prepare(model, {"input_ids": ids}, config)
    optimizer = s2ft.optimizer(model)
    model.compile(backend="s2ft", options={"logits": False})

    def step():
        model(**step_of).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    fixed = bytes_of(model) + sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert fixed + peak_of(step) == pytest.approx(predicted.total, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process has")
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_loading_and_preparing_takes_the_quantized_model_and_one_layer(kind, tmp_path):
    """In bf16; the dense model has ten of them."""
    sizes = {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 10}
    layer = 2 * (2 * 1024**2 + 2 * 1024 * 512 + 3 * 1024 * 3584)
    dense(transformers.LlamaConfig(**sizes, **HEADS), torch.bfloat16).save_pretrained(tmp_path / "base")
    dense(LLAMA, torch.bfloat16).save_pretrained(tmp_path / "small")
    program = Path(__file__).parent / "programs" / "load_quantized.py"
    arguments = [str(tmp_path / "base"), str(tmp_path / "small"), kind, "gradient"]
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    assert max(memory["loading"], memory["preparing"]) - memory["prepared"] <= layer, memory
    quantized = (0.6 if kind == "nf4" else 1.1) * 10 * layer / 2
    assert memory["prepared"] - memory["before"] <= quantized + 16 * 1024**2, memory


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_weight_in_pieces_has_the_bits_of_the_whole(kind, tmp_path, monkeypatch):
    """As the libraries quantize and dequantize a whole one, with pieces that leave a rest."""
    folder = tmp_path / "base"
    dense(LLAMA, torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr("s2ft_compile.cli.pieces.PIECE", 64 * 24)
    monkeypatch.setattr("s2ft_compile.quantized.ROWS", 24)
    model = load_model(folder, quantize=kind)
    how = quantization(kind, torch.bfloat16)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)
    weights = quantized_in(whole)
    assert len(weights) == 7 and quantized_in(model).keys() == weights.keys()
    for name, weight in quantized_in(model).items():
        assert type(weight.held) is type(weights[name].held) and weight.saved().keys() == weights[name].saved().keys()
        assert all(map(same_parts, weight.saved().values(), weights[name].saved().values())), name
        assert kind == "nf4" or torch.equal(weight.values(), weights[name].held.dequantize())


class Halved(torch.Tensor):
    """Made of a tensor twice as large; rows of it are either of another make, or none that the class knows."""

    @staticmethod
    def __new__(cls, twice, rows):
        return torch.Tensor._make_wrapper_subclass(cls, twice.shape, dtype=twice.dtype)

    def __init__(self, twice, rows):
        self.twice, self.rows = twice, rows

    def __tensor_flatten__(self):
        return ["twice"], {"rows": self.rows}

    def dequantize(self):
        return self.twice / 2

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].twice, args[0].rows)
        if func is torch.ops.aten.slice.Tensor and args[0].rows:
            plain, kept = args[0].twice[args[2] : args[3]], args[0].rows
            return {"plain": plain, "other make": cls(-plain, "other"), "same make": cls(plain, kept)}[kept]
        raise NotImplementedError(func)


@pytest.mark.parametrize("rows", [None, "plain", "other make", "same make"])
def test_rows_that_are_of_another_make_are_not_taken_for_the_weight(rows, monkeypatch):
    monkeypatch.setattr("s2ft_compile.quantized.ROWS", 3)
    twice = torch.randn(8, 4)
    assert len(_in_rows(Halved(twice, rows))) == (3 if rows == "same make" else 1)
    assert torch.equal(_dequantized(Halved(twice, rows)), twice / 2)


def test_the_tables_are_what_was_measured():
    root = Path(__file__).resolve().parents[1]
    sizes = json.loads((root / "benchmarks/results/quantized.json").read_text())["bytes"]
    for size in ("1B", "3B", "8B", "32B", "70B"):
        steps = [sizes[size][f"{way} {length}"]["total"] for length in (2048, 8192) for way in ("bf16", "int8", "NF4")]
        row = f"| {size} | " + " | ".join(f"{step / 2**30:.1f}" for step in steps) + " |"
        assert all(row in (root / page).read_text(encoding="utf-8") for page in ("README.md", "docs/quantized.md")), row


def test_the_trace_allocates_nothing_of_full_size_and_dequantizes_nothing(monkeypatch):
    model = quantized("own")
    monkeypatch.setattr(Rounded, "values", lambda layer: pytest.fail("dequantized"))
    analysis = s2ft.analyze(model, {"input_ids": IDS})
    assert str(analysis) == str(s2ft.analyze(dense(), {"input_ids": IDS}))
    for weight in quantized_in(model).values():
        assert weight.hollow().untyped_storage().nbytes() == 4
    assert isinstance(model.model.layers[0].mlp.up_proj, Rounded) and capture(model, (IDS,)).elsewhere == frozenset()


def test_a_weight_that_something_else_reads_is_refused():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (Rounded.of(nn.Linear(*size)) for size in ((8, 16), (16, 8)))

        def forward(self, x):
            return self.down(self.up(x)) + x @ self.up.weight.to(x.dtype).T.sum(1, keepdim=True)

    with pytest.raises(ConfigError, match="up.weight is quantized, and something else reads it"):
        s2ft.prepare(Reads(), (torch.randn(2, 3, 8),), s2ft.S2FTConfig({"up.weight": 2}))


@pytest.mark.parametrize("selection", ["weight", "weight_activation", "gradient"])
def test_selections_see_dequantized_weights(selection):
    model, same = quantized("nf4 twice"), dense()
    values = Values(model)
    same.load_state_dict({name: values[name] for name in values}, strict=False)
    config = s2ft.S2FTConfig(dict(TARGETS), selection)
    plans = [s2ft.prepare(m, {"input_ids": IDS}, config, calibration=[STEP, STEP]) for m in (model, same)]
    for a, b in zip(*(plan.slices for plan in plans), strict=True):
        assert a.parameter_name == b.parameter_name and torch.equal(a.indices, b.indices.sort().values)


@pytest.mark.parametrize("kind", ["int8", "nf4 twice", "8 bits"])
def test_scores_by_gradient_are_those_of_the_dequantized_model(kind):
    """Of weights and of biases, in float64; squares double the error of gradients (`assert_gradients`)."""
    model, same = quantized(kind, BIASED), dense(BIASED)
    values = Values(model)
    same.load_state_dict({name: values[name] for name in values}, strict=False)
    names = [*quantized_in(model), *(name for name in values if name.endswith("bias"))]
    places = [(name, dim) for name in names for dim in range(len(values.shape(name)))]
    found, wanted = (calibrate(m, places, "gradient", [STEP]) for m in (model, same.double()))
    assert len(found) == 7 * 2 + 3
    for place, scores in wanted.items():
        assert (found[place] - scores).norm() <= 40 * 128**0.5 * 2.0**-24 * scores.norm(), place


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scores_by_gradient_have_the_values_of_one_weight_at_a_time(kind):
    """Memory grows with depth by what the forward saves, and not by dequantized weights, as in the libraries'."""
    peaks = []
    for layers in (1, 3):
        model = quantized(kind, transformers.LlamaConfig(**WIDE, num_hidden_layers=layers))
        places = [(name, 0) for name in quantized_in(model)]
        peaks.append(peak_of(lambda: calibrate(model, places, "gradient", [STEP])))
    assert peaks[1] - peaks[0] <= 4 * 1024 * 256


def test_a_weight_packed_in_an_unknown_way_is_refused():
    ao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    model = quantized("own")
    layer = model.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    layer.weight = nn.Parameter(Int4OpaqueTensor.from_hp(layer.weight.detach(), [1, 32]), requires_grad=False)
    with pytest.raises(ConfigError, match="up_proj.weight is of type Int4OpaqueTensor, which has no `dequantize"):
        s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({"ffn.out": 3}))
    assert ao and not s2ft.is_prepared(model)


@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_a_base_whose_products_round_their_input_is_refused(name):
    """The library's backward gives no gradient through that, and says nothing."""
    model = dense()
    quantize(model.model.layers[0].mlp, _torchao(name))
    with pytest.raises(ConfigError, match="gate_proj.weight is of type .*its product rounds the input"):
        s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({"ffn.out": 3}))
    assert not s2ft.is_prepared(model)


class Mixture(nn.Module):
    """Experts made of linear layers. Each sees all tokens, and counts where it is one of the two that were chosen."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64, bias=False)) for _ in range(3)
        )

    def forward(self, x):
        shares, chosen = self.router(x).softmax(-1).topk(2, -1)
        return sum((shares * (chosen == i)).sum(-1, keepdim=True) * e(x) for i, e in enumerate(self.experts))


@pytest.mark.parametrize("kind, compiled", [("int8", True), ("nf4 twice", False)])
def test_experts_that_are_linear_layers_train(kind, compiled):
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(2, 12, 64)
    whole = copy.deepcopy(model).double()
    quantize(model, QUANTIZE[kind])
    plan = s2ft.prepare(model, (x,), s2ft.S2FTConfig({"experts.*.0.weight": 3, "experts.*.2.weight": 5}))
    assert len(plan.slices) == 6 and all(isinstance(block, Beside) for block in state_of(model).blocks)
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.01)
    values = {name: value.double() for name, value in Values(model).items() if name in whole.state_dict()}
    for s in plan.slices:
        values[s.parameter_name] = values[s.parameter_name].index_add(s.dim, s.indices, s.delta.detach().double())
    whole.load_state_dict(values)
    whole(x.double()).square().sum().backward()
    net = torch.compile(model, backend="s2ft", options={"inner": "aot_eager"}) if compiled else model
    net(x).square().sum().backward()
    for s in plan.slices:
        expected = whole.get_parameter(s.parameter_name).grad.index_select(s.dim, s.indices)
        # sums of up to 128 terms through some 10 operators
        assert (s.delta.grad - expected).norm() <= 10 * 128**0.5 * 2.0**-24 * expected.norm(), s.parameter_name


@pytest.mark.parametrize("kind", ["int4 in bytes"])
def test_experts_stay_dense(kind, tmp_path):
    """Both libraries quantize linear layers alone: batched experts train in place, beside quantized attention."""
    moe = transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=2, num_experts_per_tok=1, use_cache=False)
    model = quantized(kind, moe)
    plan = s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({"moe.out": 3, "attention.out": 1}))
    kinds = {s.roles[0]: type(block) for s, block in zip(plan.slices, state_of(model).blocks)}
    assert kinds == {"moe.out": InPlace, "attention.out": Beside}
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.01)
    model.train()(**STEP).loss.backward()
    assert_gradients(model, moe, 2.0**-23, torch.float32)  # products by groups have no float64
    # experts train in another order: the weights are the same afterwards, and sums over their channels to rounding
    assert {name.rpartition(".")[2] for name, _, _ in state_of(model).moves} == {"gate_up_proj", "down_proj"}
    trained = logits(model.eval())
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again := quantized(kind, moe), tmp_path / "adapter")
    s2ft.release(model)
    assert torch.equal(logits(again), logits(model))
    assert (logits(again) - trained).norm() <= 20 * 128**0.5 * 2.0**-24 * trained.norm()


def test_quantized_and_dense_weights_in_one_structure():
    """The axes of a quantized weight stay where they are; a dense one of its structure trains in scattered rows."""
    model = quantized("own")
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Linear(64, 128, bias=False)
    before = logits(model)
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({"ffn.in": 3, "ffn.out": 3, "attention.out": 1}))
    assert torch.equal(logits(model), before)
    kinds = {block.name.split(".")[-2]: type(block) for block in state_of(model).blocks}
    assert kinds == {"gate_proj": Beside, "up_proj": InPlace, "down_proj": Beside, "o_proj": Beside}
    s2ft.parameters(model)[0].grad = None
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.01)
    model(**STEP).loss.backward()
    assert_gradients(model)


def test_the_base_is_one_call_away_and_never_written():
    model = quantized("nf4 twice")
    before = fingerprint(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
    first = logits(model)
    optimizer = s2ft.optimizer(model)
    losses = []
    for _ in range(3):
        loss = model.train()(**STEP).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.eval()
        assert not torch.equal(logits(model), first)
    assert losses[2] < losses[1] < losses[0]
    with s2ft.disabled(model):
        assert torch.equal(logits(model), first)
    with s2ft.base_values(model):
        assert torch.equal(logits(model), first)
    trained = logits(model)
    s2ft.release(model)
    assert torch.equal(logits(model), trained) and not s2ft.is_prepared(model)
    with pytest.raises(StateError, match="unload_adapter"):
        s2ft.prepare(model, {"input_ids": IDS})
    unload_adapter(model)
    after = fingerprint(model), dict(model.named_parameters())
    assert after[0] == before[0] and after[1].keys() == before[1].keys()
    assert all(torch.equal(p, after[1][n]) for n, p in before[1].items()) and torch.equal(logits(model), first)
    with pytest.raises(StateError, match="no slices"):
        unload_adapter(model)


@pytest.mark.parametrize("targets", [{**TARGETS, "norm": 1.0}, {"norm": 1.0}])
def test_what_is_taken_off_leaves_the_base_of_dense_weights_too(targets, tmp_path):
    def assert_base(model):
        unload_adapter(model)
        assert torch.equal(logits(model), first) and fingerprint(model) == before
        assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
        with pytest.raises(StateError, match="no slices"):
            unload_adapter(model)

    model, plain = quantized("nf4 twice"), quantized("nf4 twice")
    first, before = logits(model), fingerprint(model)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(targets))
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.05)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    s2ft.release(model)
    for _ in range(2):
        load_adapter(plain, tmp_path / "adapter")
        for again in (model, plain):
            assert torch.equal(logits(again), trained) and not torch.equal(trained, first)
            with pytest.raises(AdapterError, match="an adapter is on this quantized model already.*unload_adapter"):
                load_adapter(again, tmp_path / "adapter")
            assert_base(copy.deepcopy(again))
        assert_base(plain)
    assert_base(model)


def test_an_optimizer_made_before_is_refused():
    model = quantized("own")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
    model(**STEP).loss.backward()
    with pytest.raises(StateError, match="made before the model was prepared"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["int8", "nf4 twice"])
def test_state_goes_on_bit_for_bit(kind):
    model = prepared(kind)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    again = quantized(kind)
    s2ft.prepare(again, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
    again = again.to("cpu")
    assert str(again.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(logits(again), logits(model)) and torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    other = dense()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    layer = QUANTIZE[kind](other.model.layers[0].mlp.up_proj)
    changed = {f"model.layers.0.mlp.up_proj.{name}": t for name, t in layer.state_dict().items()}
    deltas = [d.clone() for d in s2ft.parameters(again)]
    with pytest.raises(StateError, match=r"not of this prepared model's base: model.layers.0.mlp.up_proj"):
        again.load_state_dict({**state, **changed, state_of(model).blocks[0].delta_name: deltas[0] + 1})
    assert torch.equal(s2ft.parameters(again)[0], deltas[0])


def chosen_anew(kind: str, times: int = 3) -> nn.Module:
    """Trained for a step of each selection, the first but for one of which other units had learned something before."""
    model = quantized(kind)
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({**TARGETS, "norm": 1.0}, seed=4))
    optimizer = s2ft.optimizer(model, lr=0.03)
    for step in range(times + 1):
        if step:
            s2ft.reselect(model)
        model.train()(**STEP).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", ["int8", "nf4 twice"])
def test_units_chosen_anew_beside_weights(kind, tmp_path):
    first, before = logits(quantized(kind)), fingerprint(quantized(kind))
    model = chosen_anew(kind)
    state, trained = state_of(model), logits(model)
    beside = [left for left in state.left_behind if left.beside]
    assert {left.name for left in beside} == {b.name for b in state.blocks if b.beside}
    model.train()(**STEP).loss.backward()
    assert_gradients(model)
    wanted = oracle(model)(input_ids=IDS).logits
    assert (trained - wanted).norm() <= 20 * 128**0.5 * 2.0**-24 * wanted.norm()
    with s2ft.disabled(model):
        assert torch.equal(logits(model), first) and fingerprint(model) == before
    with s2ft.base_values(model):
        assert torch.equal(logits(model), first)
    with merged(model):
        assert torch.equal(logits(model), trained)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = quantized(kind)
    s2ft.prepare(again, {"input_ids": IDS}, s2ft.S2FTConfig({**TARGETS, "norm": 1.0}))
    assert str(again.load_state_dict(torch.load(file, weights_only=False))) == "<All keys matched successfully>"
    same = [again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(logits(other), trained) for other in same)
    s2ft.load_trained_state(same[1], {name: t.clone() for name, t in s2ft.trained_state(model).items()})
    assert torch.equal(logits(same[1]), trained)
    s2ft.reselect(same[1])  # goes on
    for other, size in zip(state_of(same[1]).blocks, state.blocks):
        assert other.delta.shape == size.delta.shape

    values, plan = Values(quantized(kind)), state.all_trained
    save_adapter(model, tmp_path / "adapter")
    plain = quantized(kind)
    load_adapter(plain, tmp_path / "adapter")
    assert (logits(plain) - wanted).norm() <= 20 * 128**0.5 * 2.0**-24 * wanted.norm()
    patches = {patch.name: patch for patch in s2ft.patches(model)}
    s2ft.release(same[0])
    assert torch.equal(logits(same[0]), trained)
    for name, source in (("prepared", model), ("released", same[0]), ("loaded", plain)):
        save_merged(source, tmp_path / name, dequantize=True)
        found = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for s in plan.slices:
            expected = values[s.parameter_name].float().index_add(s.dim, s.indices, s.delta.detach())
            assert torch.equal(found[s.parameter_name], expected), s.parameter_name
    assert patches.keys() == {s.parameter_name for s in plan.slices}
    unload_adapter(same[0])
    assert torch.equal(logits(same[0]), first) and not any("earlier" in n for n, _ in same[0].named_buffers())


def test_what_is_chosen_anew_is_scored_with_all_that_trained():
    """The oracle: the dense model in float64, with what its units have learned."""
    model = chosen_anew("int8", 1)
    dense64 = oracle(model)
    names = [block.name for block in state_of(model).blocks if block.beside]
    for selection in ("gradient", "weight_activation"):
        with merged(model):
            found = calibrate(model, [(name, 0) for name in names], selection, [STEP])
        wanted = calibrate(dense64, [(name, 0) for name in names], selection, [STEP])
        for place, scores in wanted.items():
            assert (found[place] - scores).norm() <= 40 * 128**0.5 * 2.0**-24 * scores.norm(), place
    present = Trained(model)
    for name in names:
        torch.testing.assert_close(present[name].double(), dict(dense64.named_parameters())[name], rtol=2e-7, atol=1e-9)


def test_graphs_of_units_chosen_anew_beside_weights():
    """The room for what trained before grows in steps: by four selections, then by eight."""
    rooms = [room(3, times, 999) / 3 for times in range(1, 33)]
    assert sorted(set(rooms)) == [4, 8, 12, 16, 24, 32] and all(place >= n for n, place in enumerate(rooms, 1))
    assert room(3, 9, 20) == 17, "all others"
    left = Left("w", 0, torch.arange(6), torch.ones(6, 4), torch.ones(0, dtype=torch.bfloat16), beside=True)
    delta, index, inverse = padded(left, 12, 99)
    assert delta.shape == (12, 4) and delta.sum() == 24 and delta.dtype == torch.bfloat16 and len(index) == 12
    assert inverse[:7].tolist() == [0, 1, 2, 3, 4, 5, 6] and (inverse[7:] == 6).all(), "6: zeros"
    torch._dynamo.reset()
    model = quantized("int8")
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS), seed=4))
    counter = torch._dynamo.testing.CompileCounter()
    net, optimizer = torch.compile(model.train(), backend=counter), s2ft.optimizer(model, lr=0.003)
    for times in range(11):
        if times:
            s2ft.reselect(model)
        net(**STEP).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert counter.frame_count == 1 + (times > 0) + (times > 4) + (times > 8), times


@pytest.mark.parametrize("kind", LIBRARIES)
def test_adapter_and_merged_model(kind, tmp_path):
    model = prepared(kind, norm=1.0)
    trained, values = logits(model), Values(quantized(kind))
    save_adapter(model, tmp_path / "adapter")
    plain = quantized(kind)
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(logits(plain), trained)
    with pytest.raises(AdapterError, match="unload_adapter"):
        load_adapter(plain, tmp_path / "adapter")
    again, plan = prepared(kind, norm=1.0), state_of(model).plan
    for delta in s2ft.parameters(again):
        delta.data.zero_()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)

    with pytest.raises(ExportError, match="dequantize=True"):
        save_merged(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    for name, source in (("merged", model), ("loaded", plain)):
        save_merged(source, tmp_path / name, dequantize=True)
        found = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for s in plan.slices:
            expected = values[s.parameter_name].float().index_add(s.dim, s.indices, s.delta.detach())
            assert torch.equal(found[s.parameter_name], expected), s.parameter_name
    assert torch.equal(logits(model), trained) and torch.equal(logits(plain), trained)
    save_lora(model, tmp_path / "lora")


def test_an_adapter_of_a_quantized_base_on_another(tmp_path):
    model = prepared("own")
    save_adapter(model, tmp_path / "adapter")
    full = dense()
    with pytest.warns(UserWarning, match="quantization error"):
        load_adapter(full, tmp_path / "adapter")
    s, weights = state_of(model).plan.slices[0], dict(full.named_parameters())
    held = dict(dense().named_parameters())[s.parameter_name]
    assert torch.equal(weights[s.parameter_name], held.index_add(s.dim, s.indices, s.delta.detach()))
    other = dense()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(AdapterError, match="another base model.*model.norm.weight"):
        load_adapter(other, tmp_path / "adapter")
    with warnings.catch_warnings(), pytest.raises(AdapterError, match="another base model"):
        warnings.simplefilter("error")
        changed = quantized("own")
        changed.model.layers[0].mlp.up_proj.scale *= 2
        load_adapter(changed, tmp_path / "adapter")


@pytest.mark.parametrize("trained, loaded", [("int8", "nf4"), ("nf4", "int8"), ("dense", "nf4 twice")])
def test_an_adapter_on_a_base_that_was_quantized_otherwise(trained, loaded, tmp_path):
    """With a warning, beside that base's values; up to the rounding of sums of 128 terms through 20 operators."""
    model = dense() if trained == "dense" else quantized(trained)
    plan = s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({**TARGETS, "norm": 1.0}))
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.02)
    save_adapter(model, tmp_path / "adapter")
    other, whole = quantized(loaded), dense()
    sums = {n: w.detach().clone() for n, w in Values(other).items()}
    for s in plan.slices:
        sums[s.parameter_name].index_add_(s.dim, s.indices, s.delta.detach())
    whole.load_state_dict(sums, strict=False)
    expected = logits(whole.double())
    bank = s2ft.AdapterBank(quantized(loaded))
    for load in (lambda: load_adapter(other, tmp_path / "adapter"), lambda: bank.add("it", tmp_path / "adapter")):
        with pytest.warns(UserWarning, match="7 weights, which are quantized otherwise or in one of the two alone"):
            load()
    with bank.batch(["it", "it"]):
        for found in (logits(other), logits(bank.model)):
            assert (found - expected).norm() <= 20 * 128**0.5 * 2.0**-24 * expected.norm()
    changed = quantized(loaded)
    changed.model.norm.weight.data.mul_(2)
    with pytest.raises(AdapterError, match="another base model.*differs in model.norm.weight"):
        load_adapter(changed, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("save", [save_lora, save_shira])
def test_peft_gives_the_outputs_of_training_on_the_same_base(kind, save, tmp_path):
    """Up to the rounding of sums of 128 terms through 20 operators. In train mode, where bitsandbytes does not round
    its scales to bfloat16."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    dense().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", quantize=kind)
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({**TARGETS, "norm": 1.0}))
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.02)
    save(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base", quantize=kind), tmp_path / "peft").train()
    trained = logits(model.train())
    assert (logits(theirs) - trained).norm() <= 20 * 128**0.5 * 2.0**-24 * trained.norm()


def adapters(kind: str, folder) -> dict[str, s2ft.plan.Plan]:
    """Two adapters of one base, that train other units of the same weights."""
    plans = {}
    for seed, name in enumerate("ab"):
        model = quantized(kind)
        plans[name] = s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({**TARGETS, "*norm*": 1.0}, seed=seed))
        for s in plans[name].slices:
            s.delta.data.normal_(std=0.02)
        save_adapter(model, folder / name)
    return plans


def storages(model: nn.Module) -> dict[str, tuple]:
    """Of each quantized weight where its first piece lies, and what all of them hold."""
    return {
        name: (
            next(parts_of([("", weight.held)]))[1].data_ptr(),
            *(digest(t) for _, t in parts_of(weight.saved().items())),
        )
        for name, weight in quantized_in(model).items()
    }


@pytest.mark.parametrize("kind", ["int8", "nf4 twice"])
def test_a_bank_switches_batches_and_fuses(kind, tmp_path):
    """One adapter is what `load_adapter` gives, bit for bit; a batch and a sum are what they say, up to the rounding of
    sums of up to 128 terms through some 20 operators. The quantized weights stay as they are, every bit of them."""
    plans, model = adapters(kind, tmp_path), quantized(kind)
    before, plain = storages(model), logits(model)
    alone = {}
    for name in plans:
        loaded = quantized(kind)
        load_adapter(loaded, tmp_path / name)
        alone[name] = logits(loaded)
    bank = s2ft.AdapterBank(model)
    for name in plans:
        bank.add(name, tmp_path / name)
    for name in ("a", "b", "a", None):
        bank.activate(name)
        assert torch.equal(logits(model), plain if name is None else alone[name]) and storages(model) == before
    close = partial(torch.testing.assert_close, rtol=0, atol=20 * 128**0.5 * 2.0**-24 * float(plain.abs().max()))
    with bank.batch(["b", None]):
        close(logits(model), torch.stack([alone["b"][0], plain[1]]))
        assert storages(model) == before
    weights = {"a": 1.0, "b": -0.5}
    bank.activate("b")
    bank.fuse(weights)
    fused = logits(model)
    assert storages(model) == before
    with bank.using("b"):
        assert torch.equal(logits(model), alone["b"])
    assert torch.equal(logits(model), fused)
    with pytest.raises(AdapterError, match="the sum is not finite in model.layers.0"):
        bank.fuse({"a": 1e38 * 10, "b": 1.0})
    assert torch.equal(logits(model), fused)
    bank.activate(None)
    assert torch.equal(logits(model), plain) and storages(model) == before
    sums = {n: w.detach().clone() for n, w in Values(model).items()}
    for name, weight in weights.items():
        for s in plans[name].slices:
            sums[s.parameter_name].index_add_(s.dim, s.indices, weight * s.delta.detach())
    oracle = dense()
    oracle.load_state_dict(sums, strict=False)
    close(fused, logits(oracle))


def test_a_bank_refuses_what_cannot_lie_beside_a_weight(tmp_path):
    model = prepared("own")
    save_adapter(model, tmp_path / "adapter")
    s2ft.release(model)
    with pytest.raises(StateError, match="unload_adapter"):
        s2ft.AdapterBank(model)
    unload_adapter(model)
    bank, read = s2ft.AdapterBank(model), read_adapter(tmp_path / "adapter")
    rows = next(s for s in read.slices if s.dim == 0)
    columns = replace(rows, dim=1, indices=torch.arange(3), delta=torch.zeros(rows.shape[0], 3))
    bank.add("rows", read)
    bank.add("columns", replace(read, plan=replace(read.plan, slices=(columns,))))
    before = logits(model)
    with pytest.raises(AdapterError, match="is quantized, and one adapter changes rows of it"):
        bank.fuse({"rows": 1.0, "columns": 1.0})
    assert bank.active == () and torch.equal(logits(model), before)


def test_patches_are_of_the_dequantized_base(tmp_path):
    model = prepared("nf4 twice", dtype=torch.bfloat16)
    with s2ft.disabled(model):
        weights = {name: w.detach().to(torch.bfloat16, copy=True) for name, w in Values(model).items()}
    for patch in s2ft.patches(model):
        patch.apply(weights[patch.name])
    save_merged(model, tmp_path / "merged", dequantize=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(weights[s.parameter_name], merged[s.parameter_name]) for s in state_of(model).plan.slices)


def test_onnx_of_what_is_dequantized(tmp_path):
    """In float it is the dense model of the sums; in fewer bits, with the adapter as an input, within their limit."""
    import onnxruntime

    model = prepared("nf4 twice")
    trained, ids = logits(model), {"input_ids": IDS.numpy()}
    s2ft.exporters.export_onnx(model, tmp_path / "merged.onnx", {"input_ids": IDS})
    output = onnxruntime.InferenceSession(tmp_path / "merged.onnx").run(None, ids)[0]
    # one sum instead of two: rounding of up to 128 terms through some 20 operators
    tolerance = 20 * 128**0.5 * 2.0**-24 * float(trained.abs().max())
    torch.testing.assert_close(torch.from_numpy(output), trained, rtol=0, atol=tolerance)
    s2ft.exporters.export_onnx(model, tmp_path / "base.onnx", {"input_ids": IDS}, "separate", quantize="int8")
    s2ft.exporters.save_onnx_adapter(model, tmp_path / "tuned.onnx_adapter")
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(tmp_path / "tuned.onnx_adapter"))
    session = onnxruntime.InferenceSession(tmp_path / "base.onnx")
    with s2ft.disabled(model):
        untrained = logits(model)
    for want, how in ((untrained, None), (trained, options)):
        got = torch.from_numpy(session.run(None, ids, how)[0])
        assert (got - want).norm() <= FORMS["int8"].limit * want.norm()
        options.add_active_adapter(adapter)
    assert torch.equal(logits(model), trained) and quantized_in(model)
    save_adapter(model, tmp_path / "adapter")
    s2ft.release(model)
    with pytest.raises(ExportError, match="unload_adapter"):
        s2ft.exporters.export_onnx(model, tmp_path / "twice.onnx", {"input_ids": IDS}, [tmp_path / "adapter"])


def test_a_replaced_forward_is_refused_and_nothing_changes():
    model = quantized("own")
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = layer.forward
    with pytest.raises(StateError, match="down_proj.weight: the forward of its layer was replaced"):
        s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
    del layer.forward
    assert not s2ft.is_prepared(model) and not any(
        "delta" in n for n, _ in [*model.named_parameters(), *model.named_buffers()]
    )
    assert all(type(q.layer) is Rounded for q in quantized_in(model).values())


def loaded(kind: str, folder: Path) -> nn.Module:
    """By transformers, and prepared, with deltas that are not zero."""
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    dense(dtype=torch.bfloat16).save_pretrained(folder)
    model = load_model(folder, quantize=kind)
    assert model.hf_quantizer is not None and quantized_in(model)
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.01)
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_not_written_whole_is_not_there(kind, tmp_path, monkeypatch):
    model = loaded(kind, tmp_path / "base")
    trained, save = logits(model), type(model).save_pretrained
    for how in ({}, {"dequantize": True}, {"requantize": True}):
        with files_of_at_most(16384), pytest.raises(ExportError, match="could not write"):
            save_merged(model, tmp_path / "full", **how)
    with files_of_at_most(4096), pytest.raises(ExportError, match="could not write"):
        save_adapter(model, tmp_path / "full")

    def damage(self, folder, **options):
        save(self, folder, **options)
        file = Path(folder) / "model.safetensors"
        held = bytearray(file.read_bytes())
        held[-1] ^= 1  # of the last tensor, and those of the smallest types come last
        file.write_bytes(held)

    monkeypatch.setattr(type(model), "save_pretrained", damage)
    with pytest.raises(ExportError, match="was not written correctly: read again, its .* is in no file"):
        save_merged(model, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert torch.equal(logits(model), trained) and model.hf_quantizer is not None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loaded_by_transformers(kind, tmp_path):
    model = loaded(kind, tmp_path / "base")
    save_merged(model, tmp_path / "quantized")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    load_adapter(again, tmp_path / "quantized" / "adapter")
    assert torch.equal(logits(again), logits(model))
    save_merged(model, tmp_path / "dense", dequantize=True)
    ordinary = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not quantized_in(ordinary) and getattr(ordinary.config, "quantization_config", None) is None
    assert (logits(ordinary) - logits(model)).abs().max() <= 0.02 * logits(model).abs().max()
    assert model.hf_quantizer is not None and model.config.quantization_config is not None
    save_merged(model, tmp_path / "again", requantize=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    said, values, held = json.loads((tmp_path / "again" / "requantized.json").read_text()), Values(again), Values(model)
    for s in state_of(model).plan.slices:
        name, part = s.parameter_name, (s.dim, s.indices)
        change = values[name].index_select(*part).double() - held[name].index_select(*part).double() - s.delta
        assert said[name]["largest_change"] == pytest.approx(float(change.abs().max()))
    with pytest.raises(ConfigError, match="pass one of"):
        save_merged(model, tmp_path / "both", dequantize=True, requantize=True)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_stored_quantized(kind, tmp_path):
    """What was loaded from a quantized checkpoint is written again, in every form, and trains as it is."""
    save_merged(loaded(kind, tmp_path / "base"), tmp_path / "stored")
    model = load_model(tmp_path / "stored")
    assert quantized_in(model)
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig(dict(TARGETS)))
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.01)
    save_merged(model, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    load_adapter(again, tmp_path / "again" / "adapter")
    assert torch.equal(logits(again), logits(model))
    for source, name in ((model, "dense"), (again, "dense too")):
        save_merged(source, tmp_path / name, dequantize=True)
        ordinary = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert not quantized_in(ordinary)
        assert (logits(ordinary) - logits(model)).abs().max() <= 0.02 * logits(model).abs().max()
    for write in (merge_checkpoint, extract):
        given = [tmp_path / "again" / "adapter"] if write is merge_checkpoint else tmp_path / "dense"
        with pytest.raises(ExportError, match="stored is stored quantized.*s2ft export merged"):
            write(tmp_path / "stored", given, tmp_path / "refused")
    other = "int8" if kind == "nf4" else "nf4"
    with pytest.raises(ConfigError, match=f"is quantized already .{kind}.* leave out --quantize {other}"):
        load_model(tmp_path / "stored", quantize=other)
    step = (2, 12, "auto", s2ft.S2FTConfig(dict(TARGETS)), s2ft.CompileOptions(logits=False))
    estimates = [estimate_folder(str(tmp_path / n), *step, k) for n, k in (("stored", "none"), ("base", kind))]
    assert estimates[0].weights == estimates[1].weights
    later = estimate_folder(str(tmp_path / "stored"), *step, selections=5)
    slices = [s for s in state_of(model).plan.slices if s.parameter_name in quantized_in(model)]
    rooms = 0
    for s in slices:
        n = len(s.indices)
        places = room(n, 4, s.shape[s.dim])
        rooms += places * (s.delta.numel() // n) * 2 + 8 * (places + s.shape[s.dim])
    assert later.weights - estimates[0].weights == rooms, "of four selections in bfloat16, positions, inverse"
    options = TrainOptions(str(tmp_path / "stored"), tmp_path / "data", tmp_path / "run", reselect_every=2)
    assert "quantized base" in options.keeps_units(quantized=True) and options.keeps_units() is None


def test_what_a_library_cannot_quantize_is_told(tmp_path):
    """Nothing, of GPT-2's layers, which are no linear ones to torchao; too little, of batched experts."""
    pytest.importorskip("torchao")
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    dense(transformers.GPT2Config(vocab_size=64, **sizes), torch.bfloat16).save_pretrained(tmp_path / "base")
    step = (2, 12, "auto", s2ft.S2FTConfig({"ffn.out": 3}), s2ft.CompileOptions())
    for run in (partial(load_model, tmp_path / "base"), partial(estimate_folder, str(tmp_path / "base"), *step)):
        with pytest.raises(ConfigError, match="--quantize int8 changes nothing of a GPT2LMHeadModel.*nf4 takes those"):
            run(quantize="int8")
    with torch.device("meta"):
        planned = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes))
    plan_quantization(planned, "nf4")
    assert len(quantized_in(planned)) == 4
    moe = transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=4, use_cache=False)
    with pytest.warns(UserWarning, match="--quantize int8 leaves .*MixtralForCausalLM as it is.*experts.*is in none"):
        check_some(quantized("own", moe), "int8")


def test_a_weight_that_a_library_turned_is_written_as_it_was(tmp_path):
    """GPT-2's layers have theirs as (in, out), and bitsandbytes quantizes the transpose. One here is square."""
    pytest.importorskip("bitsandbytes")
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    dense(transformers.GPT2Config(vocab_size=64, **sizes), torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", quantize="nf4")
    s2ft.prepare(model, {"input_ids": IDS}, s2ft.S2FTConfig({"attention.out": 1}))
    for delta in s2ft.parameters(model):
        delta.data.normal_(std=0.05)
    (s,), trained = state_of(model).plan.slices, logits(model)
    assert s.parameter_name == "transformer.h.0.attn.c_proj.weight" and s.shape == (64, 64)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"are \(out, in\), and a GPT2LMHeadModel .*c_proj.weight as \(in, out\)"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    ordinary = load_model(tmp_path / "base")
    s2ft.prepare(ordinary, {"input_ids": IDS}, s2ft.S2FTConfig({"attention.out": 1}))
    save_adapter(ordinary, tmp_path / "ordinary")
    with pytest.raises(AdapterError, match=r"are \(in, out\), and a GPT2LMHeadModel .*c_proj.weight as \(out, in\)"):
        load_adapter(load_model(tmp_path / "base", quantize="nf4"), tmp_path / "ordinary")
    again = load_model(tmp_path / "base", quantize="nf4")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    for source in (model, again):
        save_merged(source, tmp_path / "merged", dequantize=True)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        expected = Values(again)[s.parameter_name].float().index_add(s.dim, s.indices, s.delta.detach()).bfloat16()
        assert torch.equal(merged.get_parameter(s.parameter_name), expected.T)
        assert (logits(merged) - trained).norm() <= 0.02 * trained.norm()
        shutil.rmtree(tmp_path / "merged")
    (patch,) = s2ft.patches(model)
    unload_adapter(again)
    save_merged(again, tmp_path / "merged", dequantize=True)
    weight = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_parameter(s.parameter_name)
    patch.apply(weight)
    assert torch.equal(weight, expected.T)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_train_quantized(kind, base, text, tmp_path):  # noqa: F811
    """The command leaves the quantized checkpoint with the adapter inside, goes on where it stopped, and exports."""
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    run = tmp_path / "run"
    how = {"model": base, "data": text, "output": run, "targets": "ffn.out=3,ffn.in=3", "steps": 3, "batch-size": 2}
    how |= {"seq-len": 16, "inner": "eager", "save-every": 1, "quantize": kind}
    less = ["--no-gradient-checkpointing"] * (kind == "int8")  # which a quantized base has by default
    result = invoke("train", *(piece for name, value in how.items() for piece in (f"--{name}", value)), *less)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())  # a narrow terminal wraps it
    assert "the same units train to the end: beside a quantized base those of before take memory" in said
    numbers = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(base).parameters())
    assert json.loads((run / "metrics.json").read_text())["parameters"] == numbers  # though packed in fewer
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    load_adapter(loaded, run / "merged" / "adapter")
    result = invoke("export", "merged", "--model", base, "--adapter", run, "--output", tmp_path / "dense")
    assert result.exit_code == 0, result.output
    ordinary = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not quantized_in(ordinary)
    torch.testing.assert_close(logits(ordinary), logits(loaded), rtol=1e-2, atol=1e-2)
    result = invoke("train", "--resume", "--output", run, "--steps", 4)
    assert result.exit_code == 0, result.output
