"""ONNX files with a KV cache: one graph for prefill and decoding, whose greedy tokens are those of `generate`."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers as t
from safetensors.numpy import load_file
from small import LLAMA, assert_weights, hf, randomize, tokens
from test_data import tiny_tokenizer
from typer.testing import CliRunner

import s2ft_compile as s2ft
from s2ft_compile.cli.app import app
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.exporters import export_onnx, save_lora, save_onnx_adapter
from s2ft_compile.exporters.onnx.export import OPSETS
from s2ft_compile.slices.state import state_of

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import generate_onnx  # noqa: E402
from generate_onnx import generate, load, load_adapter  # noqa: E402

TARGETS = {"ffn.out": 5, "attention.out": 1, "ffn.in": 2, "attention.value": 1}
EXAMPLE = {"input_ids": tokens(1, 5)}


def widened(config: type, model: type, **fields) -> torch.nn.Module:
    """With weights large enough that the tokens differ."""
    torch.manual_seed(0)
    built = model(config(**fields)).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return built


MODELS = {
    "llama": lambda: hf("llama", num_hidden_layers=1),  # grouped queries
    "qwen2": lambda: hf("qwen2", num_hidden_layers=1),  # biases
    "gpt2": lambda: hf("gpt2", n_layer=1),  # learned positions, fused projections, tied
    "gemma3": lambda: widened(  # a window of three tokens in one layer, and all of them in the other
        t.Gemma3TextConfig,
        t.Gemma3ForCausalLM,
        **{**LLAMA, "sliding_window": 3},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": lambda: widened(  # experts, as grouped products
        t.MixtralConfig, t.MixtralForCausalLM, **{**LLAMA, "num_hidden_layers": 1}, num_local_experts=4
    ),
    "bloom": lambda: widened(  # no positions: they come from the mask
        t.BloomConfig, t.BloomForCausalLM, vocab_size=50, hidden_size=16, n_layer=1, n_head=4
    ),
}


def prompts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, two of them padded on the left."""
    ids = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    return ids, mask


def expected(model, ids, mask, new: int = 9, eos: int | None = None) -> np.ndarray:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=True
        ).numpy()


def generated(session, ids, mask, new: int = 9, **more) -> np.ndarray:
    return generate(session, ids.numpy(), mask.numpy(), new, **more)


def tuned(kind: str, seed: int, targets=TARGETS):
    model = MODELS[kind]()
    s2ft.prepare(model, EXAMPLE, s2ft.S2FTConfig(targets=targets, seed=seed))
    randomize(model, seed, 0.3)
    state_of(model).refresh()
    return model


@pytest.mark.parametrize(
    "kind", [kind if kind == "gemma3" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_greedy_tokens_are_those_of_generate(tmp_path, kind):
    model, (ids, mask) = MODELS[kind]().train(), prompts()
    before, config = {n: p.detach().clone() for n, p in model.named_parameters()}, model.config.to_dict()
    path = export_onnx(model, tmp_path / "model.onnx", EXAMPLE, cache=True)
    assert_weights(model, before)
    assert "forward" not in vars(model) and model.training and model.config.to_dict() == config
    model.eval()
    session = load(path)
    want = expected(model, ids, mask)
    assert len(np.unique(want[:, 6:])) > 2  # no model that says one thing only
    np.testing.assert_array_equal(generated(session, ids, mask), want)
    np.testing.assert_array_equal(generated(session, ids[2:], mask[2:]), expected(model, ids[2:], mask[2:]))
    eos = int(want[0, 7])  # ends the first row early, or more of them
    np.testing.assert_array_equal(generated(session, ids, mask, eos=[eos]), expected(model, ids, mask, eos=eos))


@pytest.mark.slow
@pytest.mark.parametrize("kind, names", [("llama", "model"), ("gpt2", "genai")])
def test_each_adapter_of_one_graph_generates_what_its_model_does(tmp_path, kind, names):
    first, second = tuned(kind, 0), tuned(kind, 1, {**TARGETS, "ffn.out": 9, "ffn.in": 3})
    before = {n: p.detach().clone() for n, p in first.named_parameters()}
    path = export_onnx(first, tmp_path / "base.onnx", EXAMPLE, adapters="separate", cache=True, names=names)
    assert_weights(first, before)
    session, (ids, mask) = load(path), prompts()
    rows = []
    for name, model in (("none", MODELS[kind]()), ("first", first), ("second", second), ("none", MODELS[kind]())):
        file = tmp_path / f"{name}.onnx_adapter"
        if name != "none":
            save_onnx_adapter(model, file, names=names)
        rows.append(generated(session, ids, mask, adapter=load_adapter(file) if name != "none" else None))
        np.testing.assert_array_equal(rows[-1], expected(model, ids, mask))
    assert not any(np.array_equal(rows[0], row) for row in rows[1:3])


def test_genai_adapters_are_what_olive_makes_of_the_lora(tmp_path):
    """`olive convert-adapters` renames, transposes, and scales B by lora_alpha / r."""
    model = tuned("llama", 0)
    save_lora(model, tmp_path / "lora", layout="pattern")
    file = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", names="genai")
    held = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    olive = {name.replace("base_model.model.model", "model"): value.T for name, value in lora.items()}
    assert olive.keys() == held.keys()
    for name, value in olive.items():
        np.testing.assert_array_equal(held[name].numpy(), value)


def test_names_and_axes_of_the_graph_and_the_genai_config_that_describes_it(tmp_path):
    """onnxruntime-genai itself is not run here: this is what its src/config.h reads, against the graph."""
    model = hf("llama", eos_token_id=[7, 9], bos_token_id=3, pad_token_id=None, num_hidden_layers=1)
    path = export_onnx(model, tmp_path / "m.onnx", EXAMPLE, cache=True, names="genai")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "genai_config.json"}
    graph = onnx.load(path).graph
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    past = {f"past_key_values.0.{kind}": ["batch", 2, "past_sequence", 4] for kind in ("key", "value")}
    present = {n.replace("past_key_values", "present"): ["batch", 2, "total_sequence", 4] for n in past}
    assert axes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        **past,
        "logits": ["batch", "sequence", 50],
        **present,
    }
    assert list(axes) == ["input_ids", "attention_mask", "position_ids", *past, "logits", *present]
    written = json.loads((tmp_path / "genai_config.json").read_text())
    decoder = written["model"]["decoder"]
    named = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    assert {n % i if "%" in n else n for n in named for i in range(decoder["num_hidden_layers"])} == axes.keys()
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (2, 4)
    assert written["model"] | {"decoder": None} == {
        "type": "decoder",
        "bos_token_id": 3,
        "eos_token_id": [7, 9],
        "pad_token_id": 7,
        "context_length": 32,
        "vocab_size": 50,
        "decoder": None,
    }
    assert decoder["filename"] == "m.onnx" and decoder["hidden_size"] == 16 and decoder["num_attention_heads"] == 4
    assert written["search"]["past_present_share_buffer"] is False


def test_the_command_line_and_the_example(tmp_path, monkeypatch, capsys):
    """`s2ft export onnx --genai --separate` leaves a folder that runs, and examples/generate_onnx.py runs it."""
    tokenizer = tiny_tokenizer()
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 1}
    hf("llama", **fields).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = hf("llama", **fields)
    s2ft.prepare(model, EXAMPLE, s2ft.S2FTConfig(targets={"ffn.out": 5}))
    randomize(model, 0, 0.3)
    state_of(model).refresh()
    s2ft.exporters.save_adapter(model, tmp_path / "adapter")
    result = CliRunner().invoke(
        app,
        [
            "export",
            "onnx",
            "--model",
            str(tmp_path / "base"),
            "--adapter",
            str(tmp_path / "adapter"),
            "--genai",
            "--separate",
            "--opset",
            "24",
            "--output",
            str(tmp_path / "out" / "m.onnx"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert {"m.onnx", "m.onnx_adapter", "genai_config.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    file, prompts = tmp_path / "out" / "m.onnx", ["the cat", "a model and the data"]
    assert onnx.load(file).opset_import[0].version == 24
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    for more, tuned_model in (([], hf("llama", **fields)), (["--adapter", f"{file}_adapter"], model)):
        monkeypatch.setattr(sys, "argv", ["x", str(file), str(file.parent), *prompts, "--max-new-tokens", "6", *more])
        capsys.readouterr()
        generate_onnx.main()
        want = expected(tuned_model, encoded["input_ids"], encoded["attention_mask"], 6, tokenizer.eos_token_id)
        text = [
            tokenizer.decode(row[len(row) - 6 - n :], skip_special_tokens=True)
            for row, n in zip(want, encoded["attention_mask"].sum(1).tolist())
        ]
        assert capsys.readouterr().out.splitlines() == [line for t in text for line in t.splitlines()]


@pytest.mark.slow
def test_weights_over_two_gigabytes_lie_beside_the_file_once(tmp_path):
    """Above what one protobuf file holds, with an embedding that is tied; needs 6 GB of memory, 2.3 GB of disk."""
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=100_000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=6,
            num_attention_heads=16,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    ).eval()
    size = sum(4 * p.numel() for p in model.parameters())
    assert size > 1 << 31
    path = export_onnx(model, tmp_path / "m.onnx", EXAMPLE, cache=True)
    try:
        assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
        assert path.stat().st_size < 1 << 20
        assert size <= (tmp_path / "m.onnx.data").stat().st_size <= 1.01 * size
        ids, mask = prompts()
        np.testing.assert_array_equal(generated(load(path), ids, mask, 3), expected(model, ids, mask, 3))
    finally:
        for file in tmp_path.iterdir():
            file.unlink()


# --- refusals ---------------------------------------------------------------------------------------------


def mamba():
    return t.MambaForCausalLM(t.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))


def t5():
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    )


class Seeing(t.LlamaForCausalLM):
    """Every token sees the prompt's last one."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **more):
        out = super().forward(input_ids, attention_mask, past_key_values=past_key_values, **more)
        return t.modeling_outputs.CausalLMOutputWithPast(logits=out.logits + out.logits[:, -1:])


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: hf("bert"), "BertForMaskedLM has no KV cache.*does not take past_key_values"),
        (t5, "T5ForConditionalGeneration has no KV cache.*encoder with a decoder"),
        (mamba, "MambaForCausalLM has no KV cache.*past_key_values"),
        (lambda: t.LlamaModel(t.LlamaConfig(**LLAMA)), "LlamaModel has no KV cache.*no logits"),
        (lambda: Seeing(t.LlamaConfig(**LLAMA)), "tokens see those that follow"),
        (lambda: torch.nn.Linear(2, 2), "Linear has no KV cache.*attention_mask, input_ids, past_key_values"),
    ],
)
def test_models_without_a_cache_that_are_asked_for_one(tmp_path, make, match):
    model = make()
    with pytest.raises(ConfigError, match=match):
        export_onnx(model, tmp_path / "m.onnx", EXAMPLE, cache=True)
    assert not list(tmp_path.iterdir()) and "forward" not in vars(model)


@pytest.mark.parametrize(
    "inputs, match",
    [
        ({"input_ids": tokens(), "pixel_values": torch.ones(2)}, "found input_ids of shape \\(2, 8\\), pixel_values"),
        ({"inputs_embeds": torch.ones(2, 3, 16)}, "found inputs_embeds"),
        ({"input_ids": torch.ones(2, 3)}, "integer input_ids"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, "found input_ids of shape \\(3,\\)"),
    ],
)
def test_example_inputs_that_generation_does_not_take(tmp_path, inputs, match):
    with pytest.raises(ConfigError, match=match):
        export_onnx(hf("llama"), tmp_path / "m.onnx", inputs, cache=True)


def test_options_that_do_not_go_together(tmp_path):
    model, path = hf("llama"), tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="opset 17 is not supported; valid: " + ", ".join(map(str, OPSETS))):
        export_onnx(model, path, EXAMPLE, opset=17)
    with pytest.raises(ConfigError, match="unknown names 'olive'; valid: model, genai"):
        export_onnx(model, path, EXAMPLE, cache=True, names="olive")
    with pytest.raises(ConfigError, match="pass cache=True"):
        export_onnx(model, path, EXAMPLE, names="genai")
    with pytest.raises(ConfigError, match="unknown names 'olive'; valid: model, genai"):
        save_onnx_adapter(tuned("llama", 0), tmp_path / "a.onnx_adapter", names="olive")
    (tmp_path / "genai_config.json").write_text("kept")
    with pytest.raises(ExportError, match="genai_config.json exists"):
        export_onnx(model, path, EXAMPLE, cache=True, names="genai")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("genai_config.json", "kept")]


def test_a_configuration_without_an_end_is_refused_by_name(tmp_path):
    model = hf("llama", eos_token_id=None)
    with pytest.raises(ConfigError, match="needs the model's eos_token_id"):
        export_onnx(model, tmp_path / "m.onnx", EXAMPLE, cache=True, names="genai")
    assert not list(tmp_path.iterdir())
