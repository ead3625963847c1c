"""Adapters beside an ONNX graph: the base alone, each adapter switched in one session, and the pass that makes room."""

import copy
import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_weights, hf, randomize, tokens

import s2ft_compile as s2ft
from s2ft_compile.errors import AdapterError, ConfigError, ExportError
from s2ft_compile.exporters import export_onnx, save_adapter, save_onnx_adapter
from s2ft_compile.exporters.onnx.adapter import places_of
from s2ft_compile.exporters.onnx.export import OPSETS
from s2ft_compile.exporters.onnx.places import NAMES, add_places
from s2ft_compile.exporters.onnx.weights import FORMS
from s2ft_compile.slices.state import state_of

TARGETS = {"ffn.out": 5, "attention.out": 1, "ffn.in": 2, "attention.value": 1}


def tuned(kind: str, seed: int, targets=TARGETS, dtype=torch.float32, **changes):
    model = hf(kind, **changes).to(dtype)
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets, seed=seed))
    randomize(model, seed)
    state_of(model).refresh()
    return model


def run(session, inputs, *files) -> torch.Tensor:
    """The logits with these adapters active."""
    options = onnxruntime.RunOptions()
    loaded = []
    for file in files:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(file))
        options.add_active_adapter(loaded[-1])
    feeds = inputs if isinstance(inputs, dict) else {"input_ids": inputs.numpy()}
    return torch.from_numpy(session.run(["logits"], feeds, options)[0])


def close(actual, expected) -> None:
    """Float32: 24 bits, sums of at most 64 terms, in two layers."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_one_session_switches_between_adapters_and_runs_without(tmp_path, kind):
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 1}
    first = tuned(kind, 0, **layers)
    second = tuned(kind, 1, {**TARGETS, "ffn.out": 9, "ffn.in": 3}, **layers)  # of other sizes
    before = {n: p.detach().clone() for n, p in first.named_parameters()}
    path = export_onnx(first, tmp_path / "base.onnx", {"input_ids": tokens()}, adapters="separate")
    assert_weights(first, before)
    for name, model in (("first", first), ("second", second)):
        assert save_onnx_adapter(model, tmp_path / f"{name}.onnx_adapter") == tmp_path / f"{name}.onnx_adapter"
    session = onnxruntime.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["input_ids"]
    assert len(session.get_overridable_initializers()) == 2 * len(state_of(first).plan.slices)
    base, inputs = hf(kind, **layers), tokens(3, 11, seed=5)
    for name in (None, "first", "second", "first", None):
        model = {None: base, "first": first, "second": second}[name]
        with torch.no_grad():
            expected = model(inputs).logits
        close(run(session, inputs, *([tmp_path / f"{name}.onnx_adapter"] if name else [])), expected)


@pytest.mark.slow
def test_room_for_the_adapters_of_several_folders(tmp_path):
    """What one adapter changes and the other does not, and one weight along both of its dimensions."""
    layers = {"num_hidden_layers": 1}
    base, models = hf("llama", **layers), {}
    name = "model.layers.0.mlp.up_proj.weight"
    models["rows"] = tuned("llama", 0, {"ffn.in": 3}, **layers)
    models["out"] = tuned("llama", 1, {"attention.out": 1}, **layers)
    for folder, model in models.items():
        save_adapter(model, tmp_path / folder)
    models["columns"] = copy.deepcopy(base)
    with torch.no_grad():
        models["columns"].get_parameter(name)[:, 2:5] += 0.1
    s2ft.exporters.extract(base, models["columns"], tmp_path / "columns")
    path = export_onnx(base, tmp_path / "base.onnx", {"input_ids": tokens()}, [tmp_path / f for f in models])
    session, inputs = onnxruntime.InferenceSession(str(path)), tokens(1, 5, seed=3)
    for folder, model in models.items():
        file = save_onnx_adapter(base, tmp_path / f"{folder}.onnx_adapter", adapter=tmp_path / folder)
        with torch.no_grad():
            close(run(session, inputs, file), model(inputs).logits)
    close(run(session, inputs), base(inputs).logits.detach())


QUANTIZABLE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1, "eos_token_id": 7}
CACHED = {f"past_key_values.0.{part}": np.zeros((3, 2, 0, 16), np.float32) for part in ("key", "value")}


@pytest.mark.parametrize(
    "kind, globs, options",
    [
        ("gpt2", ["*ln_*", "*.bias"], {}),
        ("llama", ["*norm*"], {"cache": True, "names": "genai", "quantize": "int8"}),
        pytest.param("qwen2", ["*norm*", "*.bias"], {"quantize": "int4"}, marks=pytest.mark.slow),
        pytest.param("bert", ["*LayerNorm*", "*.bias"], {}, marks=pytest.mark.slow),
    ],
)
def test_norms_and_biases_are_switched_in_one_session(tmp_path, kind, globs, options):
    """All of a vector and a part of it, beside slices and alone; and the graph is the base again without."""
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 1} | (QUANTIZABLE if kind == "llama" else {})
    several = {"all": {**dict.fromkeys(globs, 1.0), "ffn.out": 3}, "part": {globs[0]: 3}}
    base, example, folders = hf(kind, **layers), {"input_ids": tokens()}, {}
    models = {name: tuned(kind, seed, targets, **layers) for seed, (name, targets) in enumerate(several.items())}
    for name, model in models.items():
        folders[name] = save_adapter(model, tmp_path / name)
    path = export_onnx(base, tmp_path / "base.onnx", example, list(folders.values()), **options)
    named = {"names": options["names"]} if "names" in options else {}
    session, feeds = onnxruntime.InferenceSession(str(path)), {"input_ids": tokens(3, 11, seed=5).numpy()}
    if "cache" in options:
        feeds |= {"attention_mask": np.ones((3, 11), np.int64), "position_ids": np.arange(11)[None].repeat(3, 0)}
        feeds |= CACHED
    limit = FORMS[options["quantize"]].limit if "quantize" in options else 1e-6
    outputs = {None: base, **models}
    with torch.no_grad():
        outputs = {name: model(torch.from_numpy(feeds["input_ids"])).logits for name, model in outputs.items()}
    for name in (None, "all", "part", "all", None):
        file = tmp_path / f"{name}.onnx_adapter"
        if name and not file.exists():
            save_onnx_adapter(base, file, adapter=folders[name], **named)
        got = run(session, feeds, *([file] if name else []))
        error, apart = ((got - outputs[n]).norm() / got.norm() for n in (name, "all" if name != "all" else None))
        assert error < limit and 2 * error < apart, (name, error, apart)
    held = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "part.onnx_adapter")).get_parameters()
    for s in state_of(models["part"]).plan.slices:
        want = torch.zeros(s.shape).index_copy_(0, s.indices, s.delta.detach())
        assert np.array_equal(held[f"{s.parameter_name}.delta"].numpy(), want.numpy())


# --- what is written is what was meant ----------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize("names", NAMES)
def test_large_deltas_are_in_the_file_bit_for_bit(tmp_path, names):
    """Deltas of up to 192 KiB: memory that is freed too early is used again at once at such sizes."""
    model = tuned("llama", 0, {"ffn.out": 96, "attention.out": 1, "ffn.in": 72, "attention.value": 1}, **WIDE)
    file = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", names=names)
    read = onnxruntime.AdapterFormat.read_adapter(str(file))
    held = {name: value.numpy() for name, value in read.get_parameters().items()}
    slices = state_of(model).plan.slices
    assert len(held) == 2 * len(slices)
    assert max(s.delta.numel() * 4 for s in slices) >= 96 << 10
    for s in slices:
        delta, columns = s.delta.detach().T.numpy(), s.dim == 1
        if names == "genai":
            layer = s.parameter_name.removesuffix(".weight")
            A, B = held[f"{layer}.lora_A.weight"], held[f"{layer}.lora_B.weight"]
            one_hot = np.eye(s.shape[s.dim], dtype=np.float32)[s.indices]
            order = s.indices.numpy().argsort()
            A_of, B_of = (one_hot[order].T, delta[order]) if columns else (delta[:, order], one_hot[order])
            assert np.array_equal(A, A_of) and np.array_equal(B, B_of)
        else:
            side, order = ("columns" if columns else "rows"), s.indices.numpy().argsort()
            assert np.array_equal(held[f"{s.parameter_name}.{side}.indices"], s.indices.numpy()[order])
            written = held[f"{s.parameter_name}.{side}.delta"]
            assert np.array_equal(written, delta[order] if columns else delta[:, order])


def test_an_adapter_that_is_read_back_otherwise_is_refused(tmp_path, monkeypatch):
    model, ascontiguous = tuned("llama", 0, num_hidden_layers=1), np.ascontiguousarray
    held = []

    def overwritten_while_it_is_written(values):
        held.append(ascontiguous(values))
        return held[-1]

    export = onnxruntime.AdapterFormat.export_adapter

    def export_adapter(self, path):
        held[1].flat[0] += 1
        export(self, path)
        held[1].flat[0] -= 1

    monkeypatch.setattr(np, "ascontiguousarray", overwritten_while_it_is_written)
    monkeypatch.setattr(onnxruntime.AdapterFormat, "export_adapter", export_adapter)
    with pytest.raises(ExportError, match="read again, it differs in model.layers.0.*delta"):
        save_onnx_adapter(model, tmp_path / "a.onnx_adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.bfloat16))]
)
def test_a_session_with_an_adapter_gives_the_merged_model_in_each_type(tmp_path, names, dtype):
    """Float16 has 11 bits, and sums of at most 64 terms; bfloat16 is written as float32, the model's own has 8."""
    layers, example = {"num_hidden_layers": 1, "eos_token_id": 7}, {"input_ids": tokens()}
    base, model = hf("llama", **layers).to(dtype), tuned("llama", 0, dtype=dtype, **layers)
    path = export_onnx(model, tmp_path / "base.onnx", example, "separate", cache=names == "genai", names=names)
    file = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", names=names)
    session, ids = onnxruntime.InferenceSession(str(path)), tokens(3, 11, seed=5)
    feeds = {"input_ids": ids.numpy()}
    if names == "genai":
        empty = np.zeros((3, 2, 0, 4), np.float16 if dtype == torch.float16 else np.float32)
        feeds |= {"attention_mask": np.ones((3, 11), np.int64), "position_ids": np.arange(11)[None].repeat(3, 0)}
        feeds |= {f"past_key_values.0.{part}": empty for part in ("key", "value")}
    eps = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}[dtype]
    for expected, files in ((base, ()), (model, (file,))):
        with torch.no_grad():
            want = expected(ids).logits.float()
        output = run(session, feeds, *files).float()
        torch.testing.assert_close(output, want, rtol=0, atol=64 * eps * float(want.abs().max()))


@pytest.mark.parametrize(
    "broken, names, dtype, match",
    [
        ("Add", "model", torch.float32, "differs from the model with an adapter in output 'logits'"),
        ("Add", "genai", torch.float32, "differs from the model with an adapter in output 'logits'"),
        ("ScatterElements", "model", torch.float16, "cannot run the exported graph with an adapter"),
    ],
)
def test_a_graph_that_is_right_without_an_adapter_only_is_refused(tmp_path, monkeypatch, broken, names, dtype, match):
    """Sums that are left out, and a reduction that ONNX Runtime has no float16 kernel of: the check runs an adapter."""
    model = tuned("llama", 0, dtype=dtype, num_hidden_layers=1)
    before, make = {n: p.detach().clone() for n, p in model.named_parameters()}, ir.node

    def node(kind, inputs, attributes=None):
        if kind == broken == "Add":
            return make("Identity", inputs[:1])
        return make(kind, inputs, {**(attributes or {}), "reduction": "add"} if kind == broken else attributes)

    monkeypatch.setattr(ir, "node", node)
    with pytest.raises(ExportError, match=match):
        options = {"cache": names == "genai", "names": names}
        export_onnx(model, tmp_path / "m.onnx", {"input_ids": tokens()}, "separate", **options)
    assert not list(tmp_path.iterdir())
    assert_weights(model, before)


def check_quantized(path, file, base, model, cache, limit) -> None:
    """The graph is the base model without the adapter and the trained one with it, within the limit, and tells them
    apart."""
    ids = tokens(3, 11, seed=5)
    feeds = {"input_ids": ids.numpy()}
    if cache:
        feeds |= {"attention_mask": np.ones((3, 11), np.int64), "position_ids": np.arange(11)[None].repeat(3, 0)}
        feeds |= CACHED
    with torch.no_grad():
        plain, trained = base(ids).logits, model(ids).logits
    session = onnxruntime.InferenceSession(str(path))
    for files, want, other in (((), plain, trained), ((file,), trained, plain)):
        output = run(session, feeds, *files)
        error, apart = (output - want).norm() / want.norm(), (output - other).norm() / want.norm()
        assert error < limit and apart > 3 * error, (error, apart)


def counted(path) -> dict[str, int]:
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("names", ["model", pytest.param("genai", marks=pytest.mark.slow)])
def test_onnx_runtime_quantizes_the_weights_and_not_the_adapters(tmp_path, names):
    """Its tool, on the file as it is: each product of a weight is in int8, and each of an adapter is not."""
    from onnxruntime.quantization import quantize_dynamic

    base, model = hf("llama", **QUANTIZABLE), tuned("llama", 0, **QUANTIZABLE)
    example, genai = {"input_ids": tokens()}, names == "genai"
    path = export_onnx(model, tmp_path / "m.onnx", example, "separate", cache=genai, names=names)
    file, quantized = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", names=names), tmp_path / "int8.onnx"
    quantize_dynamic(path, quantized)
    kinds, slices = counted(quantized), len(state_of(model).plan.slices)
    assert kinds["MatMulInteger"] == 8  # seven of the layer, and the head
    assert kinds["MatMul"] == 2 + slices * (2 if genai else 1)  # of the attention, and the adapter's
    check_quantized(quantized, file, base, model, genai, 0.06)


@pytest.mark.parametrize("quantize, names", [("int8", "model"), pytest.param("int4", "genai", marks=pytest.mark.slow)])
def test_a_quantized_graph_is_the_float_one_within_its_limit(tmp_path, quantize, names, monkeypatch):
    """With an adapter and without. An embedding that is the head too; no weight of a product is left in float, and no
    adapter input is not; no data of the float graph, which is beside the file, is left where the other's is in it."""
    changes = {**QUANTIZABLE, "vocab_size": 96, "tie_word_embeddings": True}
    base, model = hf("llama", **changes), tuned("llama", 0, **changes)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    genai = names == "genai"
    options = {"cache": genai, "names": names, "quantize": quantize}
    size = sum(p.nbytes for p in base.parameters())
    monkeypatch.setattr("s2ft_compile.exporters.onnx.export.INLINE_BYTES", 3 * size // 4)
    path = export_onnx(model, tmp_path / "m.onnx", {"input_ids": tokens()}, "separate", **options)
    assert not (tmp_path / "m.onnx.data").exists()
    assert_weights(model, before)
    assert not list(tmp_path.glob("*.tmp"))
    file = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", names=names)
    kinds, slices = counted(path), len(state_of(model).plan.slices)
    assert kinds["MatMulNBits"] == 8 and kinds["MatMul"] == 2 + slices * (2 if genai else 1)
    held = {i.name: i for i in onnx.load(path).graph.initializer}
    assert held["model.embed_tokens.weight"].data_type == onnx.TensorProto.FLOAT16
    check_quantized(path, file, base, model, genai, FORMS[quantize].limit)


def test_a_graph_that_quantization_changes_beyond_its_limit_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "int8", dataclasses.replace(FORMS["int8"], limit=1e-6))
    model = tuned("gpt2", 0, n_layer=1)
    with pytest.raises(ExportError, match="differs from the model in output 'logits'.*of its norm, and 1e-06 is"):
        export_onnx(model, tmp_path / "m.onnx", {"input_ids": tokens()}, "separate", quantize="int8")
    with pytest.raises(ConfigError, match="unknown quantization 'int2'; valid: int8, int4"):
        export_onnx(model, tmp_path / "m.onnx", {"input_ids": tokens()}, quantize="int2")
    assert not list(tmp_path.iterdir())


# --- opsets -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("opset", OPSETS)
def test_each_opset_runs_plain_and_with_adapters(tmp_path, opset, cache):
    layers, example, ids = {"num_hidden_layers": 1}, {"input_ids": tokens()}, tokens(3, 11, seed=5)
    model, base, feeds = tuned("llama", 0, **layers), hf("llama", **layers), {"input_ids": ids.numpy()}
    if cache:
        empty = np.zeros((3, 2, 0, 4), np.float32)
        feeds |= {
            "attention_mask": np.ones((3, 11), np.int64),
            "position_ids": np.arange(11)[None].repeat(3, 0),
            "past_key_values.0.key": empty,
            "past_key_values.0.value": empty,
        }
    file = save_onnx_adapter(model, tmp_path / "one.onnx_adapter")
    for name, adapters, cases in (
        ("plain", "merged", ((model, ()),)),
        ("separate", "separate", ((base, ()), (model, (file,)))),
    ):
        path = export_onnx(model, tmp_path / f"{name}.onnx", example, adapters, cache=cache, opset=opset)
        assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", opset)]
        session = onnxruntime.InferenceSession(str(path))
        for expected, files in cases:
            with torch.no_grad():
                close(run(session, feeds, *files), expected(ids).logits)


# --- the pass ---------------------------------------------------------------------------------------------


def graph_of(kind: str, W: np.ndarray, twice: bool = False) -> ir.Model:
    """y = x W (or x W^T) as torch.onnx writes it; with `twice`, what uses y too."""
    x, weight = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["a", W.shape[0]])), None
    stored = W if kind in ("MatMul", "Gemm") else W.T
    tensor = ir.tensor(np.ascontiguousarray(stored), name="W")
    weight = ir.Value(name="W", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    nodes = []
    if kind == "Transpose":
        nodes.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
        nodes.append(ir.node("MatMul", [x, nodes[0].outputs[0]]))
    else:
        attributes = {"transB": 1} if kind == "Gemm transB" else {}
        nodes.append(ir.node(kind.split()[0], [x, weight], attributes))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["a", W.shape[1]])
    outputs = [y]
    if twice:
        nodes.append(ir.node("Neg", [y]))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "z", y.type
        nodes[-1].outputs[0].shape = y.shape
        outputs.append(nodes[-1].outputs[0])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[weight], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=9)


@settings(max_examples=25)
@given(
    st.sampled_from(["MatMul", "Gemm", "Gemm transB", "Transpose"]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([(0,), (1,), (0, 1), (1, 0)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_pass_adds_the_slices_that_are_given(kind, size_in, size_out, dims, twice, seed):
    random = np.random.default_rng(seed)
    W = random.standard_normal((size_in, size_out)).astype(np.float32)
    x = random.standard_normal((3, size_in)).astype(np.float32)
    model = graph_of(kind, W, twice)
    add_places(model.graph, [("W", d) for d in dims])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds, total = {"x": x}, W.astype(np.float64)
    np.testing.assert_allclose(session.run(["y"], feeds)[0], x @ W, rtol=1e-5, atol=1e-5)
    for d in dims:
        stored = W.shape if kind in ("MatMul", "Gemm") else W.shape[::-1]
        columns = stored[d] == size_in if size_in != size_out else (d == 0) == (kind in ("MatMul", "Gemm"))
        n = int(random.integers(1, stored[d] + 1))
        indices = np.sort(random.permutation(stored[d])[:n])
        delta = random.standard_normal((n, size_out) if columns else (size_in, n)).astype(np.float32)
        side = "columns" if columns else "rows"
        feeds.update({f"W.{side}.indices": indices, f"W.{side}.delta": delta})
        total[(indices, slice(None)) if columns else (slice(None), indices)] += delta
    output = session.run(None, feeds)
    for got, sign in zip(output, (1, -1)):
        np.testing.assert_allclose(got, sign * (x.astype(np.float64) @ total), rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(
    st.sampled_from(["MatMul", "Gemm", "Gemm transB", "Transpose"]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_pass_adds_a_lora_of_any_rank(kind, size_in, size_out, rank, twice, seed):
    random = np.random.default_rng(seed)
    W = random.standard_normal((size_in, size_out)).astype(np.float32)
    model = graph_of(kind, W, twice)
    weight = model.graph.initializers.pop("W")
    weight.name = "layer.weight"
    model.graph.initializers.add(weight)
    add_places(model.graph, [("layer.weight", 0), ("layer.weight", 1)], lora=True)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = random.standard_normal((3, size_in)).astype(np.float32)
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], x @ W, rtol=1e-5, atol=1e-5)
    A, B = (random.standard_normal(shape).astype(np.float32) for shape in ((size_in, rank), (rank, size_out)))
    output = session.run(None, {"x": x, "layer.lora_A.weight": A, "layer.lora_B.weight": B})
    for got, sign in zip(output, (1, -1)):
        np.testing.assert_allclose(
            got, sign * (x.astype(np.float64) @ (W + A.astype(np.float64) @ B)), rtol=1e-4, atol=1e-5
        )


def test_a_weight_that_is_no_factor_of_a_product_is_refused_by_its_node():
    model = graph_of("MatMul", np.ones((3, 3), np.float32))
    node = ir.node("Neg", [model.graph.initializers["W"]], name="negated")
    model.graph.append(node)
    before = len(list(model.graph))
    with pytest.raises(ExportError, match=r"W has no adapter input: node negated \(Neg\)"):
        add_places(model.graph, [("W", 0)])
    with pytest.raises(ExportError, match="V has no adapter input: the graph does not use it"):
        add_places(model.graph, [("V", 0)])
    assert len(list(model.graph)) == before and len(model.graph.inputs) == 1


# --- refusals ---------------------------------------------------------------------------------------------


def test_options_and_names_that_do_not_fit_are_refused(tmp_path):
    base = hf("llama")
    for adapters, match in (
        ("apart", "'separate' or a list"),
        (tmp_path / "a", "'separate' or a list"),
        ("separate", "not prepared"),
        ([], "no adapter"),
    ):
        with pytest.raises(ConfigError, match=match):
            export_onnx(base, tmp_path / "m.onnx", {"input_ids": tokens()}, adapters=adapters)
    model = tuned("llama", 0)
    with pytest.raises(ExportError, match="a.onnx_adapter would be"):
        save_onnx_adapter(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_belong_to_the_model_are_refused(tmp_path):
    model = tuned("llama", 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    folder, other = save_adapter(model, tmp_path / "adapter"), hf("qwen2")
    with pytest.raises(AdapterError, match="another base model"):
        export_onnx(other, tmp_path / "m.onnx", {"input_ids": tokens()}, [folder])
    with pytest.raises(ConfigError, match="deltas of its own"):
        save_onnx_adapter(model, tmp_path / "a.onnx_adapter", adapter=folder)
    assert places_of(model, [folder]) == places_of(hf("llama"), [folder]) == places_of(model, "separate")
    assert_weights(model, before)
    table = tuned("llama", 0, {"model.embed_tokens.weight": 2})
    with pytest.raises(ExportError, match="cannot be an adapter beside an ONNX graph: .* Embedding"):
        save_onnx_adapter(table, tmp_path / "a.onnx_adapter")
    assert list(tmp_path.iterdir()) == [folder]
