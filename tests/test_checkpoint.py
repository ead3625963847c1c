"""Checkpoints on disk: merged without a model to the bits of the merged model, and adapters extracted from two."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import LLAMA, hf, randomize, same_bits, tokens
from torch import nn
from typer.testing import CliRunner

import s2ft_compile as s2ft
from s2ft_compile.adapters import stored as safetensors_files
from s2ft_compile.adapters.fingerprint import fingerprint, samples_of
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.cli.app import app
from s2ft_compile.errors import AdapterError, ExportError, StateError
from s2ft_compile.exporters import extract, load_adapter, merge_checkpoint, save_adapter, save_merged
from s2ft_compile.slices.state import merged, state_of

ROLES = {"ffn.out": 3, "attention.out": 1, "ffn.in": 2, "attention.value": 1, "norm": 1.0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tuned(base: nn.Module, seed: int = 0, targets=ROLES) -> nn.Module:
    model = copy.deepcopy(base)
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets, seed=seed))
    randomize(model, seed)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sharded base, two adapters that overlap, and what each gives merged."""
    root, base = tmp_path_factory.mktemp("folders"), hf("llama").to(torch.bfloat16)
    base.save_pretrained(root / "base", max_shard_size="4KB")
    (root / "base" / "tokenizer.json").write_text("{}")
    (root / "base" / "pytorch_model.bin").write_text("the base's weights, in another format")
    for name, seed in (("first", 0), ("second", 1)):
        model = tuned(base, seed)
        save_adapter(model, root / name)
        save_merged(model, root / f"{name}_merged")
    return root


# --- merge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, dtype",
    [("llama", torch.bfloat16), ("llama", torch.float64), ("gpt2", torch.float32), ("bert", torch.float32)],
)
def test_a_merged_checkpoint_is_the_merged_model_bit_for_bit(tmp_path, kind, dtype):
    base = hf(kind, tie_word_embeddings=kind != "llama").to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB" if kind == "llama" else "1GB")
    model = tuned(base)
    save_adapter(model, tmp_path / "adapter")
    save_merged(model, tmp_path / "expected")
    assert merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out") == tmp_path / "out"
    assert same(stored(tmp_path / "out"), stored(tmp_path / "expected"))
    again = type(base).from_pretrained(tmp_path / "out", dtype=dtype)
    load_adapter(base, tmp_path / "adapter")
    assert fingerprint(again) == fingerprint(base)


def test_everything_but_the_blocks_is_copied(folders, tmp_path):
    merge_checkpoint(folders / "base", [folders / "first"], tmp_path / "out")
    before, after = tree(folders / "base"), tree(tmp_path / "out")
    assert before.keys() - after.keys() == {"pytorch_model.bin"} and after.keys() <= before.keys()
    for name, content in after.items():
        if name.endswith(".safetensors"):
            size = 8 + int.from_bytes(content[:8], "little")
            assert content[:size] == before[name][:size] and len(content) == len(before[name])
        else:
            assert content == before[name]


@given(
    st.lists(
        st.tuples(st.sampled_from(["first", "second"]), st.sampled_from([1.0, -1.0, 0.5, 0.3])),
        min_size=1,
        max_size=2,
        unique_by=lambda chosen: chosen[0],
    )
)
def test_several_adapters_are_summed_and_rounded_once(folders, tmp_path_factory, chosen):
    """Oracle: one dense delta for each weight, in float32."""
    out = tmp_path_factory.mktemp("out") / "out"
    merge_checkpoint(folders / "base", [folders / name for name, _ in chosen], out, [w for _, w in chosen])
    expected = stored(folders / "base")
    wide = {n: t.float() for n, t in expected.items()}
    for name, weight in chosen:
        for s in read_adapter(folders / name).slices:
            wide[s.parameter_name].index_add_(s.dim, s.indices, s.delta * weight)
    assert same(stored(out), {n: t.to(expected[n].dtype) for n, t in wide.items()})


def test_slices_of_one_weight_along_different_dims_are_summed(tmp_path):
    base = hf("llama")
    base.save_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    for out, dim in (("rows", 0), ("columns", 1)):
        changed = copy.deepcopy(base)
        with torch.no_grad():
            changed.get_parameter(name).narrow(dim, 1, 2).mul_(1.5)
        extract(base, changed, tmp_path / out)
    merge_checkpoint(tmp_path / "base", [tmp_path / "rows", tmp_path / "columns"], tmp_path / "out")
    W = base.get_parameter(name).detach()
    expected = W.clone()
    expected[1:3] += 1.5 * W[1:3] - W[1:3]
    expected[:, 1:3] += 1.5 * W[:, 1:3] - W[:, 1:3]
    assert same_bits(stored(tmp_path / "out")[name], expected)


# --- where a checkpoint is not as its model is ---------------------------------------------------------------


def mixtral() -> tuple[nn.Module, dict, dict]:
    """Experts: two thirds of each are one tensor of the model, and every expert is tensors of its own on disk."""
    config = t.MixtralConfig(**{**LLAMA, "num_hidden_layers": 1}, num_local_experts=4)
    targets = {"moe.out": 3, "moe.in": 2, "attention.out": 1}
    return t.MixtralForCausalLM(config), {"input_ids": tokens()}, targets


def vit() -> tuple[nn.Module, dict, dict]:
    """Every layer has other names on disk."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_labels=3)
    model = t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=8, patch_size=4))
    return model, {"pixel_values": torch.randn(1, 3, 8, 8)}, {"ffn.out": 3, "ffn.in": 2, "attention.value": 1}


@pytest.mark.parametrize("make", [mixtral, vit])
def test_a_checkpoint_with_other_names_and_forms_is_merged_and_extracted_from(tmp_path, make):
    built, inputs, targets = make()
    built.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    base = type(built).from_pretrained(tmp_path / "base").eval()
    model = copy.deepcopy(base)
    plan = s2ft.prepare(model, inputs, s2ft.S2FTConfig(targets=targets))
    assert {s.parameter_name for s in plan.slices} - stored(tmp_path / "base").keys()
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    save_merged(model, tmp_path / "tuned")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert same(stored(tmp_path / "merged"), stored(tmp_path / "tuned"))
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "extracted")
    load_adapter(receiver := copy.deepcopy(base), tmp_path / "extracted")
    with merged(model):
        assert same(dict(receiver.named_parameters()), dict(model.named_parameters()))
    merge_checkpoint(tmp_path / "base", [tmp_path / "extracted"], tmp_path / "again")
    assert same(stored(tmp_path / "again"), stored(tmp_path / "tuned"))
    extract(base, tmp_path / "tuned", tmp_path / "from_both")
    assert (
        read_adapter(tmp_path / "from_both").plan.fingerprint == read_adapter(tmp_path / "extracted").plan.fingerprint
    )
    with pytest.raises(AdapterError, match="differs in|other values there"):
        merge_checkpoint(tmp_path / "tuned", [tmp_path / "adapter"], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_form_that_is_not_understood_is_refused_with_the_reason_and_the_way_out(tmp_path, monkeypatch):
    built, inputs, targets = mixtral()
    built.save_pretrained(tmp_path / "base")
    base = t.MixtralForCausalLM.from_pretrained(tmp_path / "base").eval()
    save_merged(changed := copy.deepcopy(base), tmp_path / "same")
    s2ft.prepare(changed, inputs, s2ft.S2FTConfig(targets=targets))
    randomize(changed)
    save_adapter(changed, tmp_path / "adapter")
    save_merged(changed, tmp_path / "tuned")
    for path in [*tmp_path.glob("*/model.safetensors")]:
        tensors = load_file(path)
        lost = next(name for name in tensors if "experts.2" in name)
        save_file({n: x for n, x in tensors.items() if n != lost}, path, metadata={"format": "pt"})
    for call in (
        lambda: merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"),
        lambda: extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out"),
    ):
        with pytest.raises((AdapterError, ExportError), match="experts.2.*is missing"):
            call()
    with pytest.raises(AdapterError, match="s2ft export merged --model .*base --adapter .*adapter"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    monkeypatch.delattr("transformers.core_model_loading.revert_weight_conversion")
    with pytest.raises(AdapterError, match="could not be converted: .*s2ft export merged"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "same", "tuned"]


def test_an_adapter_is_not_added_to_itself(folders, tmp_path):
    for weights in (None, [0.5, 0.5]):
        with pytest.raises(ExportError, match="first and .*first are the same adapter.*weight of 2"):
            merge_checkpoint(folders / "base", [folders / "first"] * 2, tmp_path / "out", weights)
    assert not list(tmp_path.iterdir())


def damage_shard(base: Path) -> str:
    path = sorted(base.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    return "not a complete safetensors file"


def remove_shard(base: Path) -> str:
    sorted(base.glob("*.safetensors"))[0].unlink()
    return "not a complete safetensors file"


def lead_outside(base: Path) -> str:
    (base / safetensors_files.INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    return "outside of its folder"


def break_index(base: Path) -> str:
    (base / safetensors_files.INDEX).write_text("[]")
    return "not the index"


def nest_index(base: Path) -> str:
    (base / safetensors_files.INDEX).write_text("[" * 100_000)
    return "not the index"


def half_a_character(base: Path) -> str:
    (base / safetensors_files.INDEX).write_text(r'{"weight_map": {"a": "\ud800"}}')
    return "not the index"


def swell_index(base: Path) -> str:
    os.truncate(base / safetensors_files.INDEX, 1 << 36)  # a hole: no space on the disk
    return "has 68,719,476,736 bytes"


def remove_all(base: Path) -> str:
    for path in [*base.glob("*.safetensors"), base / safetensors_files.INDEX]:
        path.unlink()
    return "not a checkpoint"


def edit(base: Path, change) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    path = next(p for p in base.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


def other_type(base: Path) -> str:
    edit(base, lambda t, name: t.update({name: t[name].float()}))
    return "another base model.*LlamaForCausalLM in bfloat16.*differs in model.layers.1.mlp.down_proj"


def other_value(base: Path) -> str:
    edit(base, lambda t, name: t[name].mul_(1.01))
    return "another base model.*differs in model.layers.1.mlp.down_proj"


def other_name(base: Path) -> str:
    edit(base, lambda t, name: t.update(other=t.pop(name)))
    return "has no model.layers.1.mlp.down_proj"


def other_prefix(base: Path) -> str:
    """As AutoModel names the weights of an AutoModelForCausalLM."""
    for path in base.glob("*.safetensors"):
        save_file({n.removeprefix("model."): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return r"has no model.layers.*\.\.\.; it has layers\.\d.*_proj.weight: save it as a LlamaForCausalLM, whose names"


@pytest.mark.parametrize(
    "change",
    [
        damage_shard,
        remove_shard,
        lead_outside,
        break_index,
        nest_index,
        half_a_character,
        swell_index,
        remove_all,
        other_type,
        other_value,
        other_name,
        other_prefix,
    ],
)
def test_what_is_no_base_of_the_adapter_is_refused_and_nothing_is_left(folders, tmp_path, change):
    base = tmp_path / "in" / "base"
    base.mkdir(parents=True)
    for name, content in tree(folders / "base").items():
        (base / name).write_bytes(content)
    with pytest.raises((AdapterError, ExportError), match=change(base)):
        merge_checkpoint(base, [folders / "first"], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_merged_checkpoint_is_not_merged_again(folders):
    with pytest.raises(AdapterError, match="another base"):
        merge_checkpoint(folders / "first_merged", [folders / "first"], folders / "twice")
    with pytest.raises(ExportError, match="0 adapters"):
        merge_checkpoint(folders / "base", [], folders / "none")
    with pytest.raises(ExportError, match="1 adapters and 2 weights"):
        merge_checkpoint(folders / "base", [folders / "first"], folders / "none", [1.0, 1.0])


def test_a_difference_between_the_samples_is_found_and_nothing_is_left(tmp_path):
    """The block of an adapter is hashed whole."""

    class Ffn(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 2048), nn.Linear(2048, 8)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    model = Ffn()
    save_merged(model, tmp_path / "base")
    original = samples_of(model)
    changed = copy.deepcopy(model)
    s2ft.prepare(model, (torch.randn(2, 8),), s2ft.S2FTConfig(targets={"ffn.out": 1000}))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    W, indices = changed.down.weight, state_of(model).plan.slices[0].indices
    kept = W.detach().clone()
    for i in indices.tolist():
        with torch.no_grad():
            W.copy_(kept)[3, i] += 1
        if samples_of(changed) == original:
            break
    save_merged(changed, tmp_path / "changed")
    with pytest.raises(AdapterError, match="other values there"):
        merge_checkpoint(tmp_path / "changed", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".s2ft*"))


MEASURE = """
import resource, sys
from s2ft_compile.exporters import merge_checkpoint
base, adapter, out = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_checkpoint(base, [adapter], out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_a_tensor_and_not_of_a_shard(tmp_path):
    """12 tensors of 8 MB in one file; each that is merged is in memory once, its block a few times."""
    tensors = {f"layers.{i}.weight": torch.randn(1024, 2048) for i in range(12)}
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "base" / safetensors_files.SINGLE)
    for name in list(tensors)[::2]:
        tensors[name][:, 5:25] += 1
    save_file(tensors, tmp_path / "tuned" / safetensors_files.SINGLE)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *(tmp_path / n for n in ("base", "adapter", "out"))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert same(stored(tmp_path / "out"), tensors)
    assert int(run.stdout) < 60e6, f"{int(run.stdout) / 1e6:.0f} MB for 100 MB of weights"


# --- extract ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_extracting_is_the_inverse_of_merging(tmp_path, dtype):
    base = hf("llama").to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    model = tuned(base)
    save_merged(model, tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "again")
    assert same(stored(tmp_path / "again"), stored(tmp_path / "tuned"))
    extracted = {s.parameter_name: s for s in read_adapter(tmp_path / "adapter").slices}
    assert extracted.keys() == {s.parameter_name for s in state_of(model).plan.slices}
    for s in state_of(model).plan.slices:
        mine = extracted[s.parameter_name]
        assert mine.dim == s.dim and torch.isin(mine.indices, s.indices).all()
        assert len(s.shape) == 1 or len(mine.indices) == len(s.indices)  # rounding may leave nothing of a vector's
    extract(base, type(base).from_pretrained(tmp_path / "tuned", dtype=dtype), tmp_path / "from_models")
    for adapter in ("adapter", "from_models"):
        receiver = copy.deepcopy(base)
        load_adapter(receiver, tmp_path / adapter)
        assert same(dict(receiver.named_parameters()), stored(tmp_path / "tuned"))


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 999),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.integers(0, 1),
    st.integers(1, 3),
)
def test_any_change_of_a_few_rows_or_columns_is_recovered_exactly(tmp_path_factory, dtype, seed, scale, dim, n):
    """Entries that are replaced, not added to: signs flip and magnitudes change as no training would."""
    root, random = tmp_path_factory.mktemp("x"), torch.Generator().manual_seed(seed)
    W = torch.randn(7, 9, generator=random).to(dtype)
    T = W.clone()
    chosen = torch.randperm(7, generator=random)[:n]
    shape = (n, 9) if dim == 0 else (7, n)
    T.index_copy_(dim, chosen, (torch.randn(shape, generator=random) * scale).to(dtype))
    for name, tensor in (("base", W), ("tuned", T)):
        (root / name).mkdir()
        save_file({"w": tensor, "same": torch.ones(3)}, root / name / safetensors_files.SINGLE)
    extract(root / "base", root / "tuned", root / "adapter")
    (s,) = read_adapter(root / "adapter").slices
    assert s.parameter_name == "w" and s.dim == dim and set(s.indices.tolist()) <= set(chosen.tolist())
    merge_checkpoint(root / "base", [root / "adapter"], root / "again")
    assert same(stored(root / "again"), stored(root / "tuned"))


def vector(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    "base, tuned, match",
    [
        ({"w": torch.ones(4, 6)}, {"w": torch.ones(4, 6) * 2}, "w is not a slice: 24 of its 24.*4 of 4 indices"),
        ({"w": torch.zeros(4, 4)}, {"w": torch.eye(4)}, "w is not a slice: 4 of its 16"),
        ({"w": torch.ones(4, 6)}, {"w": torch.ones(4, 6)}, "the same weights"),
        ({"w": torch.ones(4, 6)}, {"w": torch.ones(6, 4)}, r"w is torch.float32 \(4, 6\).*\(6, 4\)"),
        ({"w": torch.ones(4, 6)}, {"w": torch.ones(4, 6).half()}, "w is torch.float32.*torch.float16"),
        ({"w": torch.ones(4)}, {"v": torch.ones(4)}, "only one of the two has v, w"),
        ({"w": vector(1, 2, 3)}, {"w": vector(1, 2, 4)}, "w changed, and is no tensor of finite floating"),
        ({"w": vector(1.0, 2, 3)}, {"w": vector(1, 2, float("nan"))}, "w changed, and is no tensor of finite"),
        ({"w": vector(1.0, 2, 3)}, {"w": vector(1, 2, -0.0)}, "w: 1 of its entries.*-0.0"),
        ({"w": vector(1.0, 2, 3)}, {"w": vector(1, 2, 1e-30)}, "w: 1 of its entries.*precision"),
    ],
)
def test_what_is_no_slice_is_refused_by_name(tmp_path, base, tuned, match):
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / safetensors_files.SINGLE)
    with pytest.raises(ExportError, match=match):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_prepared_model_is_not_extracted_from(tmp_path):
    base = hf("llama")
    with pytest.raises(StateError, match="save_adapter"):
        extract(base, tuned(base), tmp_path / "out")


# --- command line -----------------------------------------------------------------------------------------


def s2ft_command(*arguments) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_merge_and_extract_on_the_command_line(folders, tmp_path):
    merged, both, adapter = tmp_path / "merged", tmp_path / "both", tmp_path / "adapter"
    assert "merged" in s2ft_command("merge", folders / "base", folders / "first", merged)
    assert same(stored(merged), stored(folders / "first_merged"))
    s2ft_command("merge", folders / "base", folders / "first", folders / "second", both)
    merge_checkpoint(folders / "base", [folders / "first", folders / "second"], tmp_path / "expected")
    assert same(stored(both), stored(tmp_path / "expected"))
    s2ft_command(
        "merge", folders / "base", folders / "first", folders / "second", tmp_path / "sum", "--weights", "1,0.5"
    )
    merge_checkpoint(folders / "base", [folders / "first", folders / "second"], tmp_path / "expected_sum", [1, 0.5])
    assert same(stored(tmp_path / "sum"), stored(tmp_path / "expected_sum"))
    for arguments, message in (
        ((folders / "base", folders / "first", folders / "first", tmp_path / "no"), "the same adapter"),
        ((folders / "base", folders / "first", tmp_path / "no", "--weights", "1,x"), "numbers by commas"),
        ((folders / "base", folders / "first", tmp_path / "no", "--weights", "1,2"), "1 adapters and 2 weights"),
        (("no/such-model", folders / "first", tmp_path / "no"), "no hub id that can be reached"),
        ((tmp_path / "nowhere", folders / "first", tmp_path / "no"), "nowhere is not a checkpoint"),
    ):
        result = CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": "400"})
        assert result.exit_code == 1 and message in result.output and len(result.output.splitlines()) == 1, (
            result.output
        )
    assert not (tmp_path / "no").exists()
    for base, more, message in (
        ("no/such-model", (), "no hub id"),
        (folders / "base", ("--limit", "0.01"), "at most 0.01"),
    ):
        result = CliRunner().invoke(
            app, ["extract", str(base), str(merged), str(adapter), *more], env={"COLUMNS": "400"}
        )
        assert result.exit_code == 1 and message in result.output and not adapter.exists(), result.output
    assert "15 slices" in s2ft_command("extract", folders / "base", merged, adapter)
    merge_checkpoint(folders / "base", [adapter], tmp_path / "again")
    assert same(stored(tmp_path / "again"), stored(merged))
    s2ft_command(
        "export",
        "lora",
        "--model",
        folders / "base",
        "--adapter",
        folders / "first",
        "--output",
        tmp_path / "lora",
        "--layout",
        "padded",
        "--ranks",
        "vllm",
        "--linear-only",
    )
    s2ft_command(
        "export", "shira", "--model", folders / "base", "--adapter", folders / "first", "--output", tmp_path / "shira"
    )
    assert json.loads((tmp_path / "shira" / "adapter_config.json").read_text())["peft_type"] == "SHIRA"
    s2ft_command(
        "export",
        "onnx",
        "--model",
        folders / "base",
        "--adapter",
        folders / "first",
        "--separate",
        "--output",
        tmp_path / "model.onnx",
    )
    assert (tmp_path / "model.onnx").exists() and (tmp_path / "model.onnx_adapter").exists()
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
