"""The adapter as a LoRA: PEFT loads it and merges to our bits, in every layout, and what is no LoRA is refused."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from small import LLAMA, U32, assert_weights, hf, randomize, tokens
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import s2ft_compile as s2ft
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.exporters import lora, save_adapter, save_lora, save_shira
from s2ft_compile.slices.state import merged, state_of

ROLES = {"ffn.out": 0.3, "attention.out": 1, "ffn.in": 3, "attention.value": 1}


@pytest.fixture(autouse=True)
def no_warnings():
    """PEFT warns of keys that are missing or unknown, and of ranks it does not expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # torch's, once, of any sparse tensor
        yield


def tuned(kind: str, seed: int = 0, targets=ROLES, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """A base model, and a copy of it that is prepared and has random deltas."""
    base = hf(kind).to(dtype)
    model = copy.deepcopy(base)
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets, seed=seed))
    randomize(model, seed)
    return base, model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    with merged(model):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_peft_gives(base: nn.Module, model: nn.Module, folder: Path) -> None:
    """With the folder on `base`, the outputs of the prepared model, and its bits when merged."""
    with torch.no_grad():
        expected = model(tokens()).logits
        loaded = PeftModel.from_pretrained(base, folder)
        error = 64 * 10 * U32 * float(expected.abs().max())  # float32 sums of at most 64 products, through ten layers
        torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=0, atol=error)
    assert_weights(loaded.merge_and_unload(), weights(model))


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / lora.WEIGHTS)


@pytest.mark.parametrize(
    "kind, layout, ranks",
    [
        ("llama", "pattern", "exact"),
        ("gpt2", "pattern", "exact"),
        ("bert", "pattern", "vllm"),
        ("llama", "padded", "exact"),
        ("gpt2", "padded", "vllm"),
        ("qwen2", "padded", 16),
    ],
)
def test_peft_merges_to_the_bits_of_the_merged_model(tmp_path, kind, layout, ranks):
    base, model = tuned(kind)
    save_lora(model, tmp_path / "lora", layout=layout, ranks=ranks)
    held = [t.shape[0] for n, t in factors(tmp_path / "lora").items() if ".lora_A." in n]
    assert ranks != "vllm" or set(held) <= set(lora.VLLM_RANKS)
    assert (len(set(held)) == 1) == (layout == "padded") or ranks == "vllm"
    config = json.loads((tmp_path / "lora" / lora.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == max(held) and config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == (sorted(held) if len(set(held)) > 1 else [])
    assert_peft_gives(base, model, tmp_path / "lora")
    text = (tmp_path / "lora" / "README.md").read_text()
    served = min(r for r in lora.VLLM_RANKS if r >= max(held))  # vLLM takes no other limit
    assert f"--max-lora-rank {served} " in text and type(base).__name__ in text and "Not exact" not in text


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(2, 9),
    st.integers(0, 1),
    st.booleans(),
    st.integers(0, 9),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_the_factors_are_the_delta(n, other, size, dim, transposed, more, experts, seed):
    """B A is the slice of zeros with the delta at its indices, whatever the shape and however it is padded; of experts,
    for each, and PEFT's way of reading them (einsum of the reshaped factors) gives it back too."""
    n, random = min(n, size), torch.Generator().manual_seed(seed)
    batch, shape = ((experts,), (size, other)) if experts else ((), (size, other))
    shape = batch + (shape if dim == 0 else shape[::-1])
    dim += len(batch)
    indices = torch.randperm(size, generator=random)[:n].sort().values
    delta = torch.randn([n if d == dim else extent for d, extent in enumerate(shape)], generator=random)
    s = s2ft.Slice("layer.weight", dim, indices, shape, (), delta)
    f = lora._padded(lora._factors(s, "layer", "layer", transposed), n + more)
    expected = torch.zeros(shape).index_copy_(dim, indices, delta)
    expected = expected.transpose(-1, -2) if transposed else expected
    assert f.rank == n + more and f.B.shape[-1] == n + more
    assert torch.equal(f.B @ f.A, expected)
    if experts:
        A, B = f.tensors().values()
        A, B = A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts)
        assert torch.equal(torch.einsum("o r e, e r i -> e o i", B, A), expected)


MOE = {"moe.out": 5, "attention.out": 1}


@pytest.mark.parametrize("targets", [MOE, {**MOE, "moe.in": 3}, {"moe.in": 3}])
@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_experts_are_targeted_parameters_of_peft(tmp_path, targets, layout):
    """One parameter of a module, or both, in which case PEFT nests them."""
    fields = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 12}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**fields, num_local_experts=3)).eval()
    model = copy.deepcopy(base)
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets))
    randomize(model)
    save_lora(model, tmp_path / "lora", layout)
    assert_peft_gives(base, model, tmp_path / "lora")
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "vLLM: not for it" in text and "llama.cpp: not for it" in text


def test_experts_stored_the_other_way_are_marked_by_their_module():
    """Some libraries store an expert (in, out), and say so on the module, where PEFT looks."""
    model, random = Experts(), torch.Generator().manual_seed(0)
    s = s2ft.Slice("up", 2, torch.tensor([0, 3]), (3, 4, 5), (), torch.randn(3, 4, 2, generator=random))
    holder = nn.Sequential(model)
    source = lora.Adapter(s2ft.Plan(s2ft.S2FTConfig(), "", (dataclasses.replace(s, parameter_name="0.up"),)), {})
    (f,), _ = lora._all_factors(holder, source)
    assert f.A.shape == (3, 2, 4) and f.B.shape == (3, 5, 2)
    assert torch.equal((f.B @ f.A).transpose(1, 2), torch.zeros(3, 4, 5).index_copy_(2, s.indices, s.delta))
    for name, of, dim, match in (("0.up", holder, 0, "whole experts"), ("up", model, 2, "the model itself")):
        plan = s2ft.Plan(s2ft.S2FTConfig(), "", (dataclasses.replace(s, parameter_name=name, dim=dim),))
        with pytest.raises(ExportError, match=match):
            lora._all_factors(of, lora.Adapter(plan, {}))


class Experts(nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5))


def test_the_size_of_a_lora_is_told(tmp_path):
    _, model = tuned("llama", targets={"ffn.out": 5})
    save_lora(model, tmp_path / "lora")
    stored = sum(tensor.numel() for tensor in factors(tmp_path / "lora").values())
    trained = sum(p.numel() for p in s2ft.parameters(model))
    assert stored / trained == (16 + 24) / 16  # a rank of n costs n (in + out), a slice of columns n out
    text = (tmp_path / "lora" / "README.md").read_text()
    assert f"{4 * stored / 1e6:.1f} MB for {4 * trained / 1e6:.1f} MB of trained numbers (2.5 times)" in text


def test_every_program_scales_what_is_written_by_one(tmp_path):
    """PEFT scales by a module's own alpha / rank, vLLM and Olive by lora_alpha / r, llama.cpp by lora_alpha / the
    tensor's rank. Oracle: the delta, in float64."""
    base, model = tuned("llama", targets={**ROLES, "ffn.out": 9})
    save_lora(model, tmp_path / "default")
    save_lora(model, tmp_path / "pattern", layout="pattern")
    trained = weights(model)
    for folder, right in (("default", True), ("pattern", False)):
        config, tensors = json.loads((tmp_path / folder / lora.CONFIG).read_text()), factors(tmp_path / folder)
        assert config["lora_alpha"] == config["r"]
        scales = set()
        for name in (n for n in tensors if ".lora_B." in n):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            B, A = tensors[name].double(), tensors[name.replace("lora_B", "lora_A")].double()
            scales.add(config["lora_alpha"] / B.shape[1])
            if right:
                delta = trained[f"{layer}.weight"].double() - base.get_parameter(f"{layer}.weight").double()
                product = config["lora_alpha"] / B.shape[1] * (B @ A)
                # the trained weight is a rounded sum
                assert ((product - delta).abs() <= U32 * trained[f"{layer}.weight"].abs()).all()
        assert (scales == {1.0}) == right
        text = (tmp_path / folder / "README.md").read_text()
        assert ("convert_lora_to_gguf.py" in text) == right and ("several ranks" in text) != right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", [save_lora, save_shira])
def test_in_half_precision_peft_rounds_once_too(tmp_path, save, dtype):
    base, model = tuned("llama", targets={"ffn.out": 0.3, "ffn.in": 3, "attention.out": 1}, dtype=dtype)
    save(model, tmp_path / "made")
    assert_weights(PeftModel.from_pretrained(base, tmp_path / "made").merge_and_unload(), weights(model))


def test_a_safe_merge_in_bfloat16_differs_by_what_peft_rounds_before_it_adds(tmp_path):
    base, model = tuned("llama", dtype=torch.bfloat16)
    save_lora(model, tmp_path / "lora")
    merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload(safe_merge=True)
    for name, expected in weights(model).items():
        got, before = merged.get_parameter(name).double(), hf("llama").to(torch.bfloat16).get_parameter(name).double()
        # both round the sum to 8 bits, PEFT the delta too
        allowed = 2**-8 * ((expected.double() - before).abs() + 2 * expected.double().abs())
        assert ((got - expected.double()).abs() <= allowed).all(), name


VECTORS = {
    "llama": [{"*norm*": 1.0}, {"*norm.weight": 1.0, "ffn.out": 3, "attention.value": 1}, {"*layernorm.weight": 5}],
    "gpt2": [{"*ln_*": 1.0, "ffn.in": 3}, {"*.bias": 1.0, "ffn.out": 2}, {"*.c_fc.bias": 1.0}],
    "qwen2": [{"*.bias": 1.0, "ffn.out": 3, "attention.value": 1}, {"*norm*": 1.0, "*k_proj.bias": 1.0}],
    "bert": [{"*LayerNorm*": 1.0, "*.dense.bias": 1.0}, {"*LayerNorm.bias": 1.0, "ffn.in": 3}],
}
DRAWN = [(kind, targets) for kind, several in VECTORS.items() for targets in several]


@pytest.mark.parametrize("save", [save_lora, save_shira])
@pytest.mark.parametrize("kind, targets", DRAWN)
def test_norms_and_biases_are_those_of_the_merged_model_and_come_off_again(tmp_path, kind, targets, save):
    """In whichever way PEFT holds them: biases of LoRA's layers, or whole modules."""
    dtype = torch.bfloat16 if "*norm*" in targets else torch.float32
    base, model = tuned(kind, targets=targets, dtype=dtype)
    linear = any(not name.startswith("*") for name in targets)
    if save is save_shira and (not linear or kind == "gpt2"):
        with pytest.raises(ExportError, match="nn.Linear|none alone"):
            save(model, tmp_path / "made")
        return
    save(model, tmp_path / "made", *(["pattern"] if save is save_lora and kind == "llama" else []))
    before, expected = {n: p.detach().clone() for n, p in base.named_parameters()}, weights(model)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "made")
    with torch.no_grad():
        tuned_logits, base_logits = model(tokens()).logits, base(tokens()).logits
        u = U32 if dtype == torch.float32 else 2.0**-8
        room = 64 * 10 * u * float(tuned_logits.abs().max())  # sums of at most 64 products, through ten layers
        torch.testing.assert_close(loaded(tokens()).logits, tuned_logits, rtol=0, atol=room)
        with loaded.disable_adapter():
            assert torch.equal(loaded(tokens()).logits, base_logits)
    loaded.delete_adapter("default")  # `unload` by itself would keep modules that are stored whole
    assert_weights(loaded.unload(), before)
    merged = PeftModel.from_pretrained(base, tmp_path / "made").merge_and_unload()
    assert_weights(merged, expected)


def test_what_only_peft_takes_is_said_and_left_out_where_that_is_asked_for(tmp_path, caplog):
    base, model = tuned("llama", targets={"*norm*": 1.0, "ffn.out": 3})
    with caplog.at_level("WARNING"):
        save_lora(model, tmp_path / "whole")
    assert "for PEFT only, since it changes model.layers.0.input_layernorm and 4 more" in caplog.text
    text = (tmp_path / "whole" / "README.md").read_text()
    assert "vLLM: refuses it" in text and "llama.cpp: not for it" in text and "- `model.norm`" in text
    with pytest.raises(ExportError, match="vLLM takes no LoRA that changes model.layers.0.input_layernorm and 4 more"):
        save_lora(model, tmp_path / "vllm", ranks="vllm")
    caplog.clear()
    with caplog.at_level("WARNING"):
        save_lora(model, tmp_path / "vllm", ranks="vllm", linear_only=True)
    trained, text = weights(model), (tmp_path / "vllm" / "README.md").read_text()
    for name in (n for n in trained if "norm" in n):
        W, T = base.get_parameter(name).detach().double(), trained[name].double()
        share = float((T - W).norm() / W.norm())
        assert f"- `{name}`: {share:.3g}" in text and f"{name}, which had moved by {share:.3g}" in caplog.text
    config = json.loads((tmp_path / "vllm" / lora.CONFIG).read_text())
    assert "modules_to_save" not in config and "--max-lora-rank 8 " in text
    without = {n: W if "norm" not in n else base.get_parameter(n).detach() for n, W in trained.items()}
    assert_weights(PeftModel.from_pretrained(base, tmp_path / "vllm").merge_and_unload(), without)
    base, model = tuned("llama", targets={"*norm*": 1.0})
    with pytest.raises(ExportError, match="nothing would be left of it"):
        save_lora(model, tmp_path / "none", linear_only=True)


def test_a_module_that_peft_would_take_for_another_by_its_name(tmp_path):
    class Block(nn.Module):
        def __init__(self, inner: nn.Module | None = None):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
            if inner is not None:
                self.inner = inner

        def forward(self, x):
            x = x + self.down(torch.relu(self.up(self.norm(x))))
            return self.inner(x) if hasattr(self, "inner") else x

    base = Block(Block())
    model = copy.deepcopy(base)
    s2ft.prepare(model, (torch.randn(2, 4),), s2ft.S2FTConfig(targets={"norm.*": 1.0, "inner.down.weight": 3}))
    randomize(model)
    save_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / lora.CONFIG).read_text())["modules_to_save"] == ["norm", "inner.norm"]
    assert_weights(PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload(), weights(model))


def test_a_padded_adapter_is_hot_swapped_for_another(tmp_path):
    base, first = tuned("llama", seed=0)
    _, second = tuned("llama", seed=1)
    for name, model in (("first", first), ("second", second)):
        save_lora(model, tmp_path / name, layout="padded", ranks=16)
    loaded = PeftModel.from_pretrained(base, tmp_path / "first")
    hotswap_adapter(loaded, str(tmp_path / "second"), adapter_name="default")
    assert_weights(loaded.merge_and_unload(), weights(second))


def test_two_adapters_that_peft_adds_equal_their_sum(tmp_path):
    base, first = tuned("qwen2", seed=0)
    _, second = tuned("qwen2", seed=1)
    for name, model, layout in (("first", first, "pattern"), ("second", second, "padded")):
        save_lora(model, tmp_path / name, layout=layout)
    expected = {n: torch.zeros_like(p) for n, p in base.named_parameters()}
    for model in (first, second):
        for s in state_of(model).plan.slices:
            expected[s.parameter_name].index_add_(s.dim, s.indices, s.delta.detach())
    expected = {n: base.get_parameter(n).detach() + d for n, d in expected.items()}
    loaded = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    loaded.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
    loaded.set_adapter("both")
    assert_weights(loaded.merge_and_unload(adapter_names=["both"]), expected)


def test_a_saved_adapter_becomes_the_lora_of_the_model_that_trained_it(tmp_path):
    base, model = tuned("llama")
    save_adapter(model, tmp_path / "adapter")
    save_lora(model, tmp_path / "direct")
    save_lora(base, tmp_path / "converted", adapter=tmp_path / "adapter")
    direct, converted = factors(tmp_path / "direct"), factors(tmp_path / "converted")
    assert direct.keys() == converted.keys() and all(torch.equal(direct[n], converted[n]) for n in direct)
    with pytest.raises(ConfigError, match="deltas of its own"):
        save_lora(model, tmp_path / "other", adapter=tmp_path / "adapter")


def test_names_that_end_like_others_keep_their_ranks(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.inner = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})

        def forward(self, x):
            x = x + self.down(torch.relu(self.up(x)))
            return x + self.inner["down"](torch.relu(self.inner["up"](x)))

    base = Nested()
    model = copy.deepcopy(base)
    s2ft.prepare(
        model, (torch.randn(2, 4),), s2ft.S2FTConfig(targets={"down.weight": 2, "inner.down.weight": 5, "up.weight": 1})
    )
    randomize(model)
    save_lora(model, tmp_path / "lora")
    assert_weights(PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload(), weights(model))


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_rank_above_the_limit_is_refused_or_truncated_with_its_error(tmp_path, caplog):
    base, model = tuned("llama", targets={"ffn.out": 0.5})
    with pytest.raises(ExportError, match="down_proj needs rank 12, above 8.*truncate=True"):
        save_lora(model, tmp_path / "lora", ranks=8)
    assert not list(tmp_path.iterdir())
    with caplog.at_level("WARNING"):
        save_lora(model, tmp_path / "lora", ranks=8, truncate=True)
    trained = weights(model)
    tensors = factors(tmp_path / "lora")
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    for message, name in zip(messages, sorted(n for n in tensors if "lora_A" in n), strict=True):
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = (trained[f"{layer}.weight"] - base.get_parameter(f"{layer}.weight")).detach().double()
        BA = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        error, best = float((BA - delta).norm() / delta.norm()), torch.linalg.svdvals(delta)[8:].norm() / delta.norm()
        assert layer in message and float(message.split()[-1]) == pytest.approx(error, rel=1e-2)
        assert error == pytest.approx(float(best), rel=1e-4)  # Eckart and Young
        assert f"`{layer}`: " in (tmp_path / "lora" / "README.md").read_text()


def test_vllm_takes_no_rank_above_512():
    f = lora.Factors("layer", "layer", torch.zeros(513, 600), torch.zeros(4, 513))
    with pytest.raises(ExportError, match="rank 513, above 512, which is vLLM's limit"):
        lora._fitted(f, "vllm", truncate=False)
    assert lora._fitted(f, "vllm", truncate=True).rank == 4 and lora._fitted(f, "exact", truncate=False) is f
    assert [lora._rounded(r, "vllm") for r in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    assert "rank 513 is above 512" in lora._for_vllm({"r": 513}) and "--max-lora-rank 16 " in lora._for_vllm({"r": 9})


class Odd(nn.Module):
    """What a LoRA cannot be: an embedding, tied or not, and a parameter of the model itself."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Parameter(torch.randn(6, 6))
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) @ self.mix
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize(
    "target, tied, match",
    [("embed.weight", True, "held as embed.weight and head.weight"), ("mix", False, "the model itself holds it")],
)
def test_what_peft_has_no_place_for_is_refused(target, tied, match):
    with pytest.raises(ExportError, match=f"{target} cannot be a LoRA: .*{match}"):
        lora._all_factors(*odd(target, tied))


def test_an_embedding_is_stored_whole():
    factors, whole = lora._all_factors(*odd("embed.weight"))
    assert whole == ["embed"] and not any(t.any() for f in factors for t in f.tensors().values())


def odd(target: str, tied: bool = False) -> tuple[nn.Module, lora.Adapter]:
    """A slice of two indices of a parameter along its last dimension."""
    model = Odd(tied)
    parameter = model.get_parameter(target)
    shape = [*parameter.shape[:-1], 2]
    s = s2ft.Slice(target, len(shape) - 1, torch.tensor([0, 2]), tuple(parameter.shape), (), torch.zeros(shape))
    return model, lora.Adapter(s2ft.Plan(s2ft.S2FTConfig(), "", (s,)), {})


@pytest.mark.parametrize(
    "options, match",
    [
        ({"layout": "flat"}, "padded, pattern"),
        ({"ranks": 0}, "positive"),
        ({"ranks": True}, "positive"),
        ({"ranks": "all"}, "'exact', 'vllm'"),
    ],
)
def test_unknown_options_are_refused(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        save_lora(nn.Linear(2, 2), tmp_path / "lora", **options)
    assert not list(tmp_path.iterdir())
