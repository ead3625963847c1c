"""Merged models and adapters: bit-exact round trips, and refusals that leave and change nothing."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from small import hf, randomize, tokens
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import s2ft_compile as s2ft
from s2ft_compile.adapters import format
from s2ft_compile.adapters.fingerprint import SAMPLES, fingerprint, samples_of
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.errors import AdapterError, ExportError, S2FTError, StateError
from s2ft_compile.exporters import (
    export_onnx,
    extract,
    load_adapter,
    merge_checkpoint,
    merged,
    save_adapter,
    save_lora,
    save_merged,
    save_onnx_adapter,
    save_shira,
    sharded,
)
from s2ft_compile.exporters.files import new_directory, new_files, write_text
from s2ft_compile.slices.state import merged as merged_weights
from s2ft_compile.slices.state import state_of

WEIGHTS, CONFIG = format.WEIGHTS, format.CONFIG


class Block(nn.Module):
    def __init__(self, d: int, ffn: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, ffn), nn.Linear(ffn, d, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Toy(nn.Module):
    """Two FFN blocks between a tied embedding and head; the first name is `embed.weight`."""

    def __init__(self, d: int = 8, ffn: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, d)
        self.blocks = nn.Sequential(Block(d, ffn), Block(d, ffn))
        self.head = nn.Linear(d, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, input_ids):
        return self.head(self.blocks(self.embed(input_ids)))


IDS = torch.arange(6).reshape(2, 3)
TARGETS = {"ffn.out": 3, "ffn.in": 2}


def trained(model: nn.Module, seed: int = 1, targets=TARGETS, scale: float = 0.1) -> nn.Module:
    """The model prepared, with random deltas, as if it had been trained."""
    s2ft.prepare(model, (IDS,), s2ft.S2FTConfig(targets=targets, seed=3))
    write_deltas(model, seed, scale)
    return model


def write_deltas(model: nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in s2ft.parameters(model):
            delta.copy_(torch.randn(delta.shape, generator=generator) * scale)
    state_of(model).refresh()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a model holds, deltas too."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[n].dtype
        and x.shape == b[n].shape
        and torch.equal(x.contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n, x in a.items()
    )


def merged_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    with merged_weights(model):
        return bits(model)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/" for p in folder.rglob("*")}


# --- files: complete, or not there ------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=50), max_size=4),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([ValueError, KeyboardInterrupt, OSError]),
)
def test_a_directory_appears_whole_or_not_at_all(tmp_path_factory, files, fails_after, nested, error):
    parent = tmp_path_factory.mktemp("out")
    target = parent / "made" / "here" / "out" if nested else parent / "out"

    def write():
        with new_directory(target) as folder:
            (folder / "sub").mkdir()
            for i, (name, content) in enumerate(files.items()):
                if i == fails_after:
                    raise error("half way")
                assert not target.exists()
                (folder / "sub" / name).write_bytes(content)

    if fails_after < len(files):
        with pytest.raises(ExportError if error is OSError else error):
            write()
        assert tree(parent) == {}
    else:
        write()
        assert tree(target) == {"sub": b"/", **{f"sub/{name}": content for name, content in files.items()}}
        assert [p.name for p in parent.iterdir()] == ["made" if nested else "out"]
        (parent / "ordinary").mkdir()
        assert target.stat().st_mode == (parent / "ordinary").stat().st_mode


def test_a_directory_that_exists_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = tree(tmp_path)
    for name in ("full", "file", "file/below"):
        with pytest.raises(ExportError, match=name.split("/")[0]), new_directory(tmp_path / name):
            pytest.fail("the block must not run")
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as folder:
        (folder / "new").write_text("x")
    assert (tmp_path / "empty" / "new").exists()


def test_a_directory_that_is_filled_meanwhile_is_kept(tmp_path):
    with pytest.raises(ExportError), new_directory(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("kept")
    assert tree(tmp_path) == {"out": b"/", "out/theirs": b"kept"}


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="current folder"), new_directory("."):
        pytest.fail("the block must not run")


def test_files_appear_together(tmp_path):
    a, b = tmp_path / "x.onnx", tmp_path / "x.onnx.data"
    with pytest.raises(ValueError), new_files(a, b) as folder:
        (folder / a.name).write_text("a")
        raise ValueError
    assert tree(tmp_path) == {}
    with new_files(a, b) as folder:
        (folder / a.name).write_text("a")
        (folder / b.name).write_text("b")
        (folder / "scratch").write_text("gone")
        assert not a.exists() and not b.exists()
    assert tree(tmp_path) == {"x.onnx": b"a", "x.onnx.data": b"b"}
    a.unlink()
    with pytest.raises(ExportError, match="x.onnx.data exists"), new_files(a, b):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"x.onnx.data": b"b"}


def test_text_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_text(path, "first")
    assert tree(tmp_path) == {"new": b"/", "new/x.json": b"first"}
    with files_of_at_most(4096), pytest.raises(ExportError, match="could not write .*x.json"):
        write_text(path, "second" * 4096)
    assert tree(tmp_path) == {"new": b"/", "new/x.json": b"first"}
    write_text(path, "third")
    assert tree(tmp_path) == {"new": b"/", "new/x.json": b"third"}


KILLED = """
import os, random, signal, sys, time
from test_exporters import Toy, trained, write_deltas
from s2ft_compile.exporters import save_adapter, save_merged

model, out, moment = trained(Toy()), sys.argv[1], random.Random(0)
for kill in range(8):
    child = os.fork()
    if not child:
        for i in range(10**6):
            write_deltas(model, i, 1.0)
            save_adapter(model, f"{out}/adapter{kill}_{i}")
            save_merged(model, f"{out}/merged{kill}_{i}")
    time.sleep(moment.uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_files_only(tmp_path):
    """SIGKILL at random moments while one folder after another is written: each that has its name is complete."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    written = [path for path in tmp_path.iterdir() if not path.name.startswith(".s2ft-")]
    assert len(written) > 8
    for path in written:
        base = Toy()
        if path.name.startswith("adapter"):
            load_adapter(base, path)
        else:
            load_model(base, path / merged.WEIGHTS)
    save_merged(Toy(), tmp_path / "again")  # what was left behind is in nobody's way


WRITING = """
import sys, time
from s2ft_compile.exporters.files import new_directory

with new_directory(sys.argv[1]) as folder:
    (folder / "large").write_text("x")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    def start(name: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITING, tmp_path / name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert process.stdout.readline() == "writing\n"
        return process

    def staging() -> set[str]:
        return {p.name for p in tmp_path.iterdir() if p.name.startswith(".s2ft-")}

    killed = start("killed")
    left = staging()
    live = start("live")
    assert len(left) == 1 and left < staging()  # another process writes there: both live
    killed.kill()
    killed.wait()
    with new_directory(tmp_path / "one") as folder, new_directory(tmp_path / "two"):
        (folder / "kept").write_text("x")
        assert len(staging()) == 3 and not left & staging()  # of this process, twice, and of the live one
    live.communicate("go on\n")
    assert live.returncode == 0
    assert tree(tmp_path) == {"one": b"/", "one/kept": b"x", "two": b"/", "live": b"/", "live/large": b"x"}


# --- fingerprint ------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_base_model():
    base, model = Toy(), trained(Toy())
    assert state_of(model).plan.fingerprint == fingerprint(base)
    assert fingerprint(model) != fingerprint(base)
    with s2ft.disabled(model):
        assert fingerprint(model) == fingerprint(base)


@given(st.sampled_from([(1,), (7,), (SAMPLES + 5,), (90, 91), (3, 4, 5), ()]), st.data())
def test_the_fingerprint_sees_name_shape_dtype_and_content_but_not_strides(shape, data):
    def module(tensor, name="w"):
        built = nn.Module()
        built.register_parameter(name, nn.Parameter(tensor))
        return fingerprint(built)

    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reference = module(W)
    dims = data.draw(st.permutations(range(W.dim())))
    inverse = [dims.index(d) for d in range(W.dim())]
    assert module(W.permute(dims).contiguous().permute(inverse)) == reference
    first, last = W.clone().reshape(-1), W.clone().reshape(-1)
    first[0] += 1
    last[-1] += 1
    assert reference not in [module(W, "v"), module(W[None]), module(W.double())]
    assert reference not in [module(first.view(shape)), module(last.view(shape))]
    if W.numel() <= SAMPLES:
        flat = W.clone().reshape(-1)
        flat[data.draw(st.integers(0, W.numel() - 1))] += 1
        assert module(flat.view(shape)) != reference


def test_the_fingerprint_needs_no_content_on_the_meta_device():
    assert fingerprint(nn.Linear(3, 4, device="meta")) == fingerprint(nn.Linear(3, 4, device="meta"))
    assert fingerprint(nn.Linear(3, 4, device="meta")) != fingerprint(nn.Linear(4, 3, device="meta"))


# --- merged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_merged_module_loads_into_a_plain_one(tmp_path, dtype):
    model = trained(Toy(dtype=dtype))
    before, expected = bits(model), merged_bits(model)
    assert save_merged(model, tmp_path / "out") == tmp_path / "out"
    assert same(bits(model), before)
    plain = Toy(seed=5, dtype=dtype)
    load_model(plain, str(tmp_path / "out" / merged.WEIGHTS))
    assert same(bits(plain), expected)
    stored = load_file(tmp_path / "out" / merged.WEIGHTS)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in plain.parameters())


HF = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.mark.parametrize("kind", HF)
def test_a_merged_hugging_face_model_is_an_ordinary_folder(tmp_path, kind):
    torch.manual_seed(0)
    base = HF[kind]()
    base.save_pretrained(tmp_path / "base")
    model = trained(base, targets={"ffn.out": 0.2, "attention.out": 1})
    before, expected = bits(model), merged_bits(model)
    save_merged(torch.compile(model, backend="eager"), tmp_path / "merged")
    save_adapter(model, tmp_path / "adapter")
    assert same(bits(model), before)
    assert same(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(loaded, tmp_path / "adapter")
    assert same(bits(loaded), expected)


def test_a_plain_model_is_merged_already(tmp_path):
    plain = Toy()
    save_merged(plain, tmp_path / "out")
    other = Toy(seed=5)
    load_model(other, str(tmp_path / "out" / merged.WEIGHTS))
    assert same(bits(other), bits(plain))


def test_a_module_that_safetensors_cannot_store_is_refused(tmp_path):
    module, storage = nn.Linear(4, 4), torch.zeros(9)
    module.register_buffer("left", storage[:6])  # neither holds the other
    module.register_buffer("right", storage[3:])
    with pytest.raises(ExportError, match="Linear cannot be stored"):
        save_merged(module, tmp_path / "out")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("save", [save_merged, save_adapter])
def test_an_output_that_exists_is_refused(tmp_path, save):
    model = trained(Toy())
    before = bits(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ExportError, match="exists"):
        save(model, tmp_path / "out")
    assert tree(tmp_path) == {"out": b"/", "out/mine": b"kept"} and same(bits(model), before)


@pytest.mark.parametrize(
    "save, writer", [(save_merged, "exporters.merged.save_model"), (save_adapter, "adapters.format.save_tensors")]
)
def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, save, writer):
    def half(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(f"s2ft_compile.{writer}", half)
    model = trained(Toy())
    before = bits(model)
    with pytest.raises(ExportError, match="disk full"):
        save(model, tmp_path / "new" / "out")
    assert tree(tmp_path) == {} and same(bits(model), before)


@contextmanager
def files_of_at_most(size: int):
    """As on a disk that is full: the system refuses to write more than this into one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SAVES = {
    "merged": lambda model, out: save_merged(model, out / "made"),
    "adapter": lambda model, out: save_adapter(model, out / "made"),
    "lora": lambda model, out: save_lora(model, out / "made"),
    "shira": lambda model, out: save_shira(model, out / "made"),
    "onnx": lambda model, out: export_onnx(model, out / "made.onnx", (IDS,)),
    "onnx adapter": lambda model, out: save_onnx_adapter(model, out / "made.onnx_adapter"),
    "extract": lambda model, out: extract(Toy(512, 520), out.parent / "tuned", out / "made"),
    "merge": lambda model, out: merge_checkpoint(out.parent / "base", [out.parent / "adapter"], out / "made"),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose every file is over 64 KiB, and folders of what it was and became."""
    root, model = tmp_path_factory.mktemp("large"), trained(Toy(512, 520), targets={"ffn.out": 40, "ffn.in": 40})
    save_merged(Toy(512, 520), root / "base")
    save_merged(model, root / "tuned")
    save_adapter(model, root / "adapter")
    (root / "out").mkdir()
    return model, root / "out"


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_disk_is_one_line_and_leaves_nothing(large, kind):
    model, out = large
    with files_of_at_most(60_000), pytest.raises(ExportError, match="could not write .*made") as caught:
        SAVES[kind](model, out)
    assert tree(out) == {} and "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [save_adapter, save_lora, save_shira, save_merged])
@pytest.mark.parametrize("how", ["another bit", "a tensor less"])
def test_what_was_written_wrong_does_not_appear(tmp_path, monkeypatch, save, how):
    """What the file holds is compared with what it was to hold, whatever the library that wrote it says."""
    from safetensors import torch as library

    write = library.save_file

    def wrong(tensors, path, metadata=None):
        tensors = {name: t.clone() for name, t in tensors.items()}
        name = sorted(tensors)[0]
        if how == "another bit":
            tensors[name].view(-1)[-1:].view(torch.uint8)[0] ^= 1
        else:
            del tensors[name]
        write(tensors, path, metadata=metadata)

    for place in ("s2ft_compile.adapters.stored.save_file", "transformers.modeling_utils.safe_save_file"):
        monkeypatch.setattr(place, wrong)
    monkeypatch.setattr(merged, "save_model", lambda module, path: wrong(dict(module.named_parameters()), path))
    base = Toy() if save is not save_merged else HF["gpt2"]()
    model = trained(base, targets=TARGETS if save is not save_merged else {"ffn.out": 3})
    with pytest.raises(ExportError, match="was not written"):
        save(model, tmp_path / "out")
    if save is save_merged:
        with pytest.raises(ExportError, match="was not written"):
            save(Toy(), tmp_path / "out")
    assert tree(tmp_path) == {}


# --- adapter: round trips ---------------------------------------------------------------------------------


@cache
def prepared(dtype: torch.dtype, targets: tuple) -> nn.Module:
    return trained(Toy(dtype=dtype), targets=dict(targets))


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 99),
    st.sampled_from([1e-4, 0.1, 30.0]),
    st.sampled_from([TARGETS, {"blocks.1.up.weight": 1}]),
)
def test_base_plus_adapter_is_merged_bit_for_bit(tmp_path_factory, dtype, seed, scale, targets):
    out = tmp_path_factory.mktemp("a") / "adapter"
    model = prepared(dtype, tuple(targets.items()))
    write_deltas(model, seed, scale)
    before, expected = bits(model), merged_bits(model)
    assert save_adapter(model, out) == out
    assert same(bits(model), before)

    base = Toy(dtype=dtype)
    plan = load_adapter(base, out)
    assert same(bits(base), expected)
    assert [s.parameter_name for s in plan.slices] == [s.parameter_name for s in state_of(model).plan.slices]

    write_deltas(model, seed + 1, scale)
    assert not same(bits(model), before)
    load_adapter(model, out)
    assert same(bits(model), before) and same(merged_bits(model), expected)


def test_the_files_are_what_the_format_says(tmp_path):
    model = trained(Toy())
    save_adapter(model, tmp_path / "a")
    (tmp_path / "ordinary").touch()
    assert {p.stat().st_mode for p in (tmp_path / "a").iterdir()} == {(tmp_path / "ordinary").stat().st_mode}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["format"] == "s2ft" and config["format_version"] == 1
    assert config["base"]["fingerprint"] == fingerprint(Toy())
    assert "torch" in config["versions"] and "transformers" in config["versions"]
    tensors, base = load_file(tmp_path / "a" / WEIGHTS), dict(Toy().named_parameters())
    expected, slices = merged_bits(model), state_of(model).plan.slices
    assert len(tensors) == 2 * len(slices)
    for s in slices:
        delta, indices = tensors[f"{s.parameter_name}.delta"], tensors[f"{s.parameter_name}.indices"]
        assert delta.dtype == torch.float32 and indices.dtype == torch.int32 and (indices.diff() > 0).all()
        W = base[s.parameter_name].detach().clone()
        W.index_add_(s.dim, indices.long(), delta)  # what a reader of the two files would do
        assert torch.equal(W, expected[s.parameter_name])


def test_the_card_says_what_the_adapter_is(tmp_path):
    model = trained(Toy())
    save_adapter(model, tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    numbers = sum(p.numel() for p in s2ft.parameters(model))
    for expected in (
        "Toy in float32",
        fingerprint(Toy()),
        "`ffn.out` = 3",
        f"{numbers:,} numbers in 4 weights",
        "| ffn.out | 2 × `down` | 3 of 12 along dim 1 |",
        "seed 3",
        "load_adapter(model",
    ):
        assert expected in text


@pytest.mark.parametrize(
    "source, commit, expected",
    [
        ("org/model", None, {"name": "org/model"}),
        ("org/model", "abc", {"name": "org/model", "revision": "abc"}),
        ("/a/hub/models--org--my--model/snapshots/abc", None, {"name": "org/my/model", "revision": "abc"}),
        ("/home/someone/secret/llama", None, {"name": "llama"}),
        ("../secret/llama/", None, {"name": "llama"}),
        ("", None, {}),
        (None, "abc", {}),
    ],
)
def test_the_name_of_a_base_is_its_id_or_the_last_part_of_its_path(source, commit, expected):
    assert format.named_base(source, commit) == expected


def test_adapters_cards_and_peft_files_carry_the_name_and_revision_of_the_base(tmp_path):
    model = hf("llama", num_hidden_layers=1)
    model.config._name_or_path, model.config._commit_hash = "org/model", "abc"
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets={"ffn.out": 2}), train=False)
    randomize(model)
    save_adapter(model, tmp_path / "a")
    save_lora(model, tmp_path / "lora")
    read = read_adapter(tmp_path / "a")
    assert (read.base["name"], read.base["revision"]) == ("org/model", "abc")
    lora = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert (lora["base_model_name_or_path"], lora["revision"]) == ("org/model", "abc")
    for folder in ("a", "lora"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "\nbase_model: org/model\n" in text and "org/model at abc, a LlamaForCausalLM in float32" in text
    other = hf("llama", num_hidden_layers=1, vocab_size=51)
    with pytest.raises(AdapterError, match="another base model: org/model at abc, a LlamaForCausalLM in float32"):
        load_adapter(other, tmp_path / "a")


def test_an_adapter_is_saved_from_a_wrapped_model_and_loaded_into_one(tmp_path):
    model = trained(Toy())
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "a")
    base = Toy()
    load_adapter(torch.compile(base, backend="eager"), tmp_path / "a")
    assert same(bits(base), merged_bits(model))


def test_only_a_prepared_and_finite_model_has_an_adapter(tmp_path):
    with pytest.raises(StateError, match="not prepared"):
        save_adapter(Toy(), tmp_path / "a")
    model = trained(Toy())
    with torch.no_grad():
        s2ft.parameters(model)[0].view(-1)[3] = float("nan")
    with pytest.raises(ExportError, match="NaN"):
        save_adapter(model, tmp_path / "a")
    assert tree(tmp_path) == {}


LARGE = {"ffn.out": 3}


def overflowing(dtype=torch.float16) -> nn.Module:
    """A prepared float16 model whose deltas are finite, and one of whose sums is not: 65504 is the largest number."""
    model = trained(Toy(dtype=dtype), targets=LARGE)
    with torch.no_grad():
        s2ft.parameters(model)[1].view(-1)[5] = 1e6
    state_of(model).refresh()
    return model


@pytest.mark.parametrize("kind", ["merged", "adapter", "lora", "shira", "onnx", "onnx adapter"])
def test_a_sum_beyond_the_type_is_not_exported(tmp_path, kind):
    model = overflowing()
    before = bits(model)
    with pytest.raises(ExportError, match="blocks.1.down.weight.* not finite.*float16"):
        SAVES[kind](model, tmp_path)
    assert tree(tmp_path) == {} and same(bits(model), before)


def test_a_delta_beyond_the_type_whose_sum_is_not_is_merged_and_is_no_onnx_adapter(tmp_path):
    base = Toy(dtype=torch.float16)
    with torch.no_grad():
        base.blocks[1].down.weight.fill_(-60_000)
    model = trained(base, targets=LARGE)
    with torch.no_grad():
        s2ft.parameters(model)[1].fill_(70_000)
    state_of(model).refresh()
    save_merged(model, tmp_path / "merged")
    assert float(load_file(tmp_path / "merged" / merged.WEIGHTS)["blocks.1.down.weight"].max()) == 10_000
    with pytest.raises(ExportError, match="blocks.1.down.weight exceeds the largest torch.float16"):
        save_onnx_adapter(model, tmp_path / "a.onnx_adapter")


def test_a_sum_beyond_the_type_is_not_loaded(tmp_path):
    """An adapter that another writer made, for one base and finite in itself."""
    model = overflowing(torch.float32)
    save_adapter(model, tmp_path / "wide")
    base, plan = Toy(dtype=torch.float16), read_adapter(tmp_path / "wide").plan
    names = {s.parameter_name: dict(base.named_parameters())[s.parameter_name] for s in plan.slices}
    described = format.describe_base(
        "Toy",
        "float16",
        samples_of(base),
        {s.parameter_name: format.hash_of_block(names[s.parameter_name], s) for s in plan.slices},
    )
    (tmp_path / "a").mkdir()
    format.write_adapter(tmp_path / "a", format.Adapter(replace(plan, fingerprint=described["fingerprint"]), described))
    prepared_too = trained(Toy(dtype=torch.float16), targets=LARGE)
    refused([base, prepared_too], tmp_path / "a", "blocks.1.down.weight.*not finite in float16.*bfloat16 or float32")
    bank = s2ft.AdapterBank(base)
    with pytest.raises(AdapterError, match="not finite in float16"):
        bank.add("a", tmp_path / "a")
    assert bank.names == ()
    save_merged(base, tmp_path / "base")
    with pytest.raises(AdapterError, match="not finite in float16"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- adapter: refusals, after which the model has the bits it had -----------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(trained(Toy()), out)
    return out


@pytest.fixture(scope="module")
def receivers() -> tuple[nn.Module, nn.Module]:
    """A plain model and a prepared one that `saved` would fit."""
    return Toy(), trained(Toy(), seed=2)


def refused(models, folder: Path, match: str | None = None) -> None:
    for model in models:
        before, files, memory = bits(model), tree(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(AdapterError, match=match) as caught:
            load_adapter(model, folder)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < 100_000, f"a refused adapter took {grown} kB"
        assert str(caught.value) and same(bits(model), before) and tree(folder) == files


def copied(saved: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(saved, tmp_path_factory.mktemp("copy") / "adapter"))


def test_the_receivers_would_take_the_undamaged_adapter(saved):
    load_adapter(Toy(), saved)
    load_adapter(trained(Toy(), seed=2), saved)


@settings(max_examples=2 * settings.default.max_examples)
@given(st.sampled_from([WEIGHTS, CONFIG]), st.sampled_from(["cut", "flip", "append", "swap"]), st.data())
def test_damaged_files_are_refused(saved, receivers, tmp_path_factory, name, how, data):
    folder = copied(saved, tmp_path_factory)
    content = bytearray((folder / name).read_bytes())
    # half of the flips in the first 400 bytes: the header of safetensors
    at = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(content) - 1)))
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif how == "append":
        content += data.draw(st.binary(min_size=1, max_size=20))
    else:
        content[at : at + 8] = reversed(content[at : at + 8])
    assume(bytes(content) != (saved / name).read_bytes())
    if name == CONFIG:
        assume(not _same_json(bytes(content), saved / CONFIG))  # another space or line end
    (folder / name).write_bytes(content)
    refused(receivers, folder)


def _same_json(content: bytes, path: Path) -> bool:
    try:
        return json.loads(content) == json.loads(path.read_text())
    except ValueError:
        return False


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_files_are_refused_by_name(saved, receivers, tmp_path_factory, name):
    folder = copied(saved, tmp_path_factory)
    (folder / name).unlink()
    refused(receivers, folder, match=name)
    refused(receivers, folder / "nowhere", match="not an adapter")
    (folder / name).mkdir()
    refused(receivers, folder, match=name)


def forge(folder: Path, tensors=None, config=None, raw: bytes | None = None) -> None:
    """Rewrites the files with checksums that fit, as someone would who knows the format."""
    if tensors is not None:
        content = load_file(folder / WEIGHTS)
        tensors(content)
        save_file(content, folder / WEIGHTS)
    if raw is not None:
        (folder / WEIGHTS).write_bytes(raw)
    values = json.loads((folder / CONFIG).read_text())
    values["weights_sha256"] = format.hash_of_file(folder / WEIGHTS)
    if config is not None:
        config(values)
    values["config_sha256"] = format.hash_of_config(values)
    (folder / CONFIG).write_text(json.dumps(values))


def indices_become(content):
    """An edit of both files: the first slice's indices, in the tensors and in the plan."""

    def tensors(t):
        t[sorted(k for k in t if k.endswith(".indices"))[0]] = torch.tensor(content, dtype=torch.int32)

    def config(values):
        sorted(values["plan"]["slices"], key=lambda s: s["parameter_name"])[0]["indices"] = content

    return {"tensors": tensors, "config": config}


def first_delta(change):
    def tensors(t):
        name = sorted(k for k in t if k.endswith(".delta"))[0]
        t[name] = change(t[name]).contiguous()

    return {"tensors": tensors}


def with_entry(value):
    def change(delta):
        delta = delta.clone()
        delta.view(-1)[-1] = value
        return delta

    return first_delta(change)


def plan_slice(**values):
    return {"config": lambda c: c["plan"]["slices"][0].update(values)}


def header(claims: dict) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
FORGERIES = {
    "delta as float64": (first_delta(torch.Tensor.double), "float64"),
    "delta as bfloat16": (first_delta(torch.Tensor.bfloat16), "bfloat16"),
    "delta transposed": (first_delta(lambda t: t.T), "a delta of"),
    "delta one short": (first_delta(lambda t: t[:-1]), "a delta of"),
    "delta flat": (first_delta(lambda t: t.reshape(-1)), "a delta of"),
    "NaN": (with_entry(float("nan")), "NaN"),
    "infinity": (with_entry(-float("inf")), "infinite"),
    "index below": (indices_become([-1, 2, 3]), "ascending"),
    "index above": (indices_become([1, 2, 12]), "from 0 to 11"),
    "index far above": (indices_become([1, 2, 2**31 - 1]), "from 0 to 11"),
    "index twice": (indices_become([1, 2, 2]), "each once"),
    "indices not sorted": (indices_become([2, 1, 3]), "ascending"),
    "no indices": (indices_become([]), "one or more"),
    "indices of two dimensions": (indices_become([[1, 2, 3]]), "ascending"),
    "other indices": (indices_become([0, 1, 2, 3]), "a delta of"),
    "indices unlike the plan's": ({"tensors": indices_become([0, 1, 2])["tensors"]}, "not those of the plan"),
    "indices as int64": (
        {"tensors": lambda t: t.update({k: v.long() for k, v in t.items() if "indices" in k})},
        "int32",
    ),
    "tensor missing": ({"tensors": lambda t: t.pop(sorted(t)[0])}, "same tensors"),
    "tensor too many": ({"tensors": lambda t: t.update(more=torch.zeros(3))}, "same tensors: more"),
    "slice too few": ({"config": lambda c: c["plan"]["slices"].pop()}, "same tensors"),
    "slice twice": ({"config": lambda c: c["plan"]["slices"].append(c["plan"]["slices"][0])}, "one slice"),
    "unknown parameter": (
        {
            "tensors": lambda t: t.update({k.replace("blocks.0", "blocks.7"): t.pop(k) for k in list(t)}),
            "config": lambda c: [
                s.update(parameter_name=s["parameter_name"].replace("blocks.0", "blocks.7"))
                for s in c["plan"]["slices"]
            ],
        },
        "has no blocks.7",
    ),
    "nameless parameter": (plan_slice(parameter_name=3), "parameter's name"),
    "listed parameter": (plan_slice(parameter_name=["x"]), "parameter's name"),
    "other shape": (plan_slice(shape=[8, 13]), "parameter of shape"),
    "shape of words": (plan_slice(shape=["a", "b"]), "a shape is of integers"),
    "shape of a number": (plan_slice(shape=8), "a shape is of integers"),
    "shape beyond int64": (plan_slice(shape=[8, 2**63]), "parameter of shape"),
    "shape far beyond int64": (plan_slice(shape=[2**70, 12]), "parameter of shape"),
    "shape of booleans": (plan_slice(shape=[True, 12]), "a shape is of integers"),
    "dim as text": (plan_slice(dim="1"), "a dim is of integers"),
    "dim as a fraction": (plan_slice(dim=1.7), "a dim is of integers"),
    "dim beyond int64": (plan_slice(dim=2**70), "dim 1180591620717411303424"),
    "indices as fractions": (plan_slice(indices=[1.5, 2.5, 3.5]), "indices are integers"),
    "indices as a map": (plan_slice(indices={"0": 1}), "indices are a list"),
    "roles as numbers": (plan_slice(roles=[1]), "roles are a list of texts"),
    "roles as a text": (plan_slice(roles="ffn.out"), "roles are a list of texts"),
    "slices as a map": ({"config": lambda c: c["plan"].update(slices={"a": 1})}, "not a plan"),
    "slices as a number": ({"config": lambda c: c["plan"].update(slices=3)}, "not a plan"),
    "configuration as a list": ({"config": lambda c: c["plan"].update(config=[])}, "a map of options"),
    "types as a list": ({"config": lambda c: c.update(delta_dtypes=["float64"])}, "not an adapter: AttributeError"),
    "types as a text": ({"config": lambda c: c.update(delta_dtypes="float64")}, "not an adapter: AttributeError"),
    "blocks as numbers": (
        {"config": lambda c: c["base"].update(blocks=dict.fromkeys(c["base"]["blocks"], 1))},
        "other",
    ),
    "half a surrogate pair": (
        {"config": lambda c: c["base"]["samples"].update({"\ud800": "0"})},
        "not an adapter: UnicodeEncodeError",
    ),
    "a parameter's name of half a pair": (plan_slice(parameter_name="\ud800"), "same tensors"),
    "dim above": (plan_slice(dim=2), "dim 2"),
    "dim below": (plan_slice(dim=-1), "dim -1"),
    "no plan": ({"config": lambda c: c.pop("plan")}, "not a plan"),
    "plan of words": ({"config": lambda c: c.update(plan="words")}, "not a plan"),
    "slices of words": ({"config": lambda c: c["plan"].update(slices=["words"])}, "not a plan"),
    "indices of words": (plan_slice(indices=["words"]), "not a plan"),
    "index beyond int64": (plan_slice(indices=[2**70]), "not a plan"),
    "future plan": ({"config": lambda c: c["plan"].update(version=99)}, "version 99"),
    "no base": ({"config": lambda c: c.pop("base")}, "which base model"),
    "base of words": ({"config": lambda c: c.update(base="words")}, "which base model"),
    "two bases": ({"config": lambda c: c["base"].update(fingerprint="0" * 64)}, "two base models"),
    "other samples": ({"config": lambda c: c["base"]["samples"].popitem()}, "do not make its fingerprint"),
    "samples of words": ({"config": lambda c: c["base"].update(samples=["words"])}, "do not make its fingerprint"),
    "no samples": ({"config": lambda c: c["base"].pop("samples")}, "do not make its fingerprint"),
    "float64 stated, float32 given": (
        {"config": lambda c: c["delta_dtypes"].update({c["plan"]["slices"][0]["parameter_name"]: "float64"})},
        "a delta of torch.float32",
    ),
    "10^12 elements along dim 1": (plan_slice(shape=[8, 10**12]), "parameter of shape"),
    "10^12 elements along dim 0": (plan_slice(shape=[10**12, 12]), "a delta of"),
    "negative shape": (plan_slice(shape=[-8, 12]), "parameter of shape"),
    "other base block": ({"config": lambda c: c["base"].update(blocks={})}, "other values there"),
    "other format": ({"config": lambda c: c.update(format="other")}, "format 'other'.*valid: 's2ft'"),
    "LoRA": ({"config": lambda c: (c.clear(), c.update(peft_type="LORA"))}, "format 'LORA'"),
    "future format": ({"config": lambda c: c.update(format_version=2)}, "format version 2.*version 1"),
    "format version of words": ({"config": lambda c: c.update(format_version="1")}, "format version '1'"),
    "no bytes": ({"raw": b""}, "not a valid safetensors"),
    "header longer than the file": ({"raw": struct.pack("<Q", 1 << 60) + b"{}"}, "not a valid safetensors"),
    "header claims terabytes twice": ({"raw": header({"a.delta": HUGE, "a.indices": HUGE})}, "not a valid"),
    "header of 100 MB": ({"raw": struct.pack("<Q", 10**8) + b" " * 100}, "not a valid"),
    "header claims terabytes": ({"raw": header({"blocks.0.down.weight.delta": HUGE})}, "not a valid"),
    "a pickle": ({"raw": b"\x80\x02}q\x00."}, "not a valid safetensors"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_files_are_refused(saved, receivers, tmp_path_factory, forgery):
    edits, match = FORGERIES[forgery]
    folder = copied(saved, tmp_path_factory)
    forge(folder, **edits)
    refused(receivers, folder, match)


def test_a_configuration_that_no_adapter_has_is_refused_before_it_is_read(saved, receivers, tmp_path_factory):
    folder = copied(saved, tmp_path_factory)
    os.truncate(folder / CONFIG, 1 << 36)  # a hole: no space on the disk, 64 GiB to whoever reads it
    with pytest.raises(AdapterError, match="has 68,719,476,736 bytes"):
        load_adapter(receivers[0], folder)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800"])
def test_a_path_that_no_file_has_is_refused_in_a_line(receivers, path):
    with pytest.raises(AdapterError, match="not an adapter") as caught:
        load_adapter(receivers[0], path)
    assert len(str(caught.value)) < 1000


NO_CONFIGURATION = ["", "[]", "null", "3", "{", '{"format": NaN', "[" * 100_000, "\ud800", "9" * 5000]


@pytest.mark.parametrize("text", NO_CONFIGURATION)
def test_what_is_no_configuration_is_refused(saved, receivers, tmp_path_factory, text):
    folder = copied(saved, tmp_path_factory)
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(receivers, folder, "not valid JSON|format")


def test_another_base_is_refused_and_both_are_named(saved, tmp_path):
    others = [Toy(seed=9), Toy(dtype=torch.bfloat16), trained(Toy(seed=9))]
    for model in others:
        refused([model], saved, fingerprint(Toy()))
        with s2ft.disabled(model) if model is others[-1] else torch.no_grad():
            own = fingerprint(model)
        refused([model], saved, own)
    refused([nn.Linear(2, 2)], saved, "Toy in float32.*Linear in float32")


def test_an_adapter_is_not_added_twice(saved):
    base = Toy()
    load_adapter(base, saved)
    refused([base], saved)


def test_a_base_that_differs_only_between_the_fingerprint_samples_is_refused(tmp_path):
    model = trained(Toy(d=96, ffn=96), targets={"ffn.out": 4})
    save_adapter(model, tmp_path / "a")
    s = state_of(model).plan.slices[0]
    base = Toy(d=96, ffn=96)
    W, reference = dict(base.named_parameters())[s.parameter_name], fingerprint(base)
    original = W.detach().clone()
    for row in range(96):
        with torch.no_grad():
            W.copy_(original)[row, s.indices[0]] += 1
        if fingerprint(base) == reference:
            return refused([base], tmp_path / "a", "other values there")
    pytest.fail("every entry is in the sample: the test needs a larger parameter")


@pytest.mark.parametrize("targets", [{"ffn.out": 3}, {"ffn.out": 4, "ffn.in": 2}, {"ffn.in": 2}])
def test_a_model_prepared_with_other_slices_is_refused(saved, targets):
    refused([trained(Toy(), targets=targets)], saved, "other slices")


def test_float64_deltas_are_refused_by_a_prepared_model_and_taken_by_a_plain_one(tmp_path):
    base, changed = Toy().double(), Toy().double()
    name = next(n for n, p in base.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        changed.get_parameter(name)[1] += torch.randn(changed.get_parameter(name).shape[1], dtype=torch.float64) / 3
    s2ft.exporters.extract(base, changed, tmp_path / "a")
    refused([trained(Toy().double(), targets={"ffn.out": 3})], tmp_path / "a", "are float64, which the float32 deltas")
    load_adapter(base, tmp_path / "a")
    assert torch.equal(base.get_parameter(name), changed.get_parameter(name))


def test_the_format_holds_no_pickle(saved):
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        assert file.keys()
    json.loads((saved / CONFIG).read_text())
    assert issubclass(AdapterError, S2FTError)


def test_the_adapter_of_a_sharded_run_is_what_any_other_run_writes(tmp_path, monkeypatch):
    """Gathered weight by weight; here there is one process, and nothing to gather."""
    model = hf("llama")
    model.config._name_or_path = "owner/name"
    s2ft.prepare(model, (tokens(),), s2ft.S2FTConfig({"ffn.out": 3, "attention.out": 1}))
    randomize(model)
    s2ft.exporters.save_adapter(model, tmp_path / "plain")
    monkeypatch.setattr(sharded, "is_sharded", lambda model: True)
    monkeypatch.setattr("s2ft_compile.exporters.adapter.first_does", lambda action: action())
    s2ft.exporters.save_adapter(model, tmp_path / "gathered")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "gathered" / name).read_bytes(), name
