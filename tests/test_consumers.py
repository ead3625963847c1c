"""The programs that take what is exported, themselves or by their own rules, on one small model's exports.

Each test runs where its program installs: onnxruntime-genai, olive-ai, gguf (llama.cpp's files), and Chromium with
onnxruntime-web, whose `dist` the environment variable ONNXRUNTIME_WEB names. PEFT is in test_lora.py and test_shira.py,
ONNX Runtime in test_onnx_adapters.py and test_onnx_cache.py.
"""

import copy
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import LLAMA, U32, hf, randomize, tokens
from test_data import tiny_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import s2ft_compile as s2ft
from s2ft_compile.exporters import (
    export_onnx,
    merge_checkpoint,
    save_adapter,
    save_lora,
    save_merged,
    save_onnx_adapter,
    save_shira,
)
from s2ft_compile.slices.state import merged

ROOT = Path(__file__).parent.parent
PROMPT, NEW = [5, 7, 9], 9
# Slices of every kind, of different numbers: rows that llama.cpp permutes (query, key), rows, and columns.
TARGETS = {"ffn.out": 5, "ffn.in": 2, "attention.query": 1, "attention.value": 1, "attention.out": 1}
OTHER = {**TARGETS, "ffn.out": 9, "ffn.in": 3, "*norm*": 1.0}


def base_model() -> nn.Module:
    return hf("llama", num_hidden_layers=1, vocab_size=300, eos_token_id=0, bos_token_id=0, tie_word_embeddings=False)


def tuned(seed: int, targets: dict) -> nn.Module:
    model = base_model()
    s2ft.prepare(model, {"input_ids": tokens(1, 5)}, s2ft.S2FTConfig(targets=targets, seed=seed))
    randomize(model, seed, 0.3)
    return model


def greedy(model: nn.Module) -> list[int]:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    generated = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NEW, use_cache=True)
    return generated[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """folder: of exports. models: by the name of their adapter. expected: their greedy tokens, all different."""
    folder = tmp_path_factory.mktemp("exports")
    models = {"base": base_model(), "law": tuned(0, TARGETS), "chat": tuned(1, OTHER)}
    models["base"].save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name in ("law", "chat"):
        save_adapter(models[name], folder / name)
    expected = {name: greedy(model) for name, model in models.items()}
    assert len(set(map(tuple, expected.values()))) == 3
    return SimpleNamespace(folder=folder, models=models, expected=expected)


@pytest.fixture(scope="module")
def genai_folder(exports):
    """One graph with room for the adapters, a file for each, and the tokenizer."""
    folder = exports.folder / "genai"
    adapters = [exports.folder / name for name in ("law", "chat")]
    base = exports.models["base"]
    export_onnx(base, folder / "model.onnx", {"input_ids": tokens(1, 5)}, adapters, cache=True, names="genai")
    for adapter in adapters:
        save_onnx_adapter(base, folder / f"{adapter.name}.onnx_adapter", adapter=adapter, names="genai")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_onnxruntime_genai_takes_an_adapter_for_each_request(exports, genai_folder, monkeypatch, capsys):
    pytest.importorskip("onnxruntime_genai")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import generate_genai

    files = {name: genai_folder / f"{name}.onnx_adapter" for name in ("law", "chat")}
    server = generate_genai.Server(genai_folder, files)
    for name in ("base", "law", "base", "chat", "law"):
        want = exports.expected[name]
        want = want[: want.index(0) + 1] if 0 in want else want  # it ends at the configuration's end
        assert list(server.generate(PROMPT, name, NEW)) == want
    with pytest.raises(KeyError, match="no adapter 'tax'; there are: base, chat, law"):
        next(server.generate(PROMPT, "tax"))
    # and as a program, with its own tokenizer
    text = tiny_tokenizer().decode(PROMPT)
    given = ["x", str(genai_folder), "--adapter", f"law={files['law']}", f"law: {text}", "--max-new-tokens", str(NEW)]
    monkeypatch.setattr(sys, "argv", given)
    generate_genai.main()
    want = tiny_tokenizer().decode(exports.expected["law"])  # random tokens are no UTF-8, on which decoders differ
    shown = capsys.readouterr().out
    assert shown.startswith(f"law: {text}") and shown.partition("\ufffd")[0].endswith(want.partition("\ufffd")[0])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_onnxruntime_genai_runs_a_quantized_graph_with_the_adapters_of_the_float_one(
    exports, genai_folder, tmp_path, monkeypatch, quantize
):
    """Its tokens are those of ONNX Runtime on the same file, which the exporter compared with the model."""
    pytest.importorskip("onnxruntime_genai")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import generate_genai
    import generate_onnx

    files = {name: genai_folder / f"{name}.onnx_adapter" for name in ("law", "chat")}
    how = dict(cache=True, names="genai", quantize=quantize)
    adapters = [exports.folder / name for name in files]
    path = export_onnx(exports.models["base"], tmp_path / "model.onnx", {"input_ids": tokens(1, 5)}, adapters, **how)
    tiny_tokenizer().save_pretrained(tmp_path)
    server, session, ids = generate_genai.Server(tmp_path, files), generate_onnx.load(path), np.array([PROMPT])
    texts = []
    for name in ("base", "law", "chat"):
        adapter = generate_onnx.load_adapter(files[name]) if name in files else None
        want = generate_onnx.generate(session, ids, np.ones_like(ids), NEW, eos=[0], adapter=adapter)[0, len(PROMPT) :]
        texts.append(list(server.generate(PROMPT, name, NEW)))
        assert texts[-1] == want.tolist()
    assert len(set(map(tuple, texts))) == 3


def test_what_olive_makes_of_the_lora_is_our_adapter_file(exports, genai_folder):
    pytest.importorskip("olive")
    import onnxruntime

    save_lora(exports.models["base"], exports.folder / "lora olive", adapter=exports.folder / "law")
    out = exports.folder / "olive"
    subprocess.run(
        [sys.executable, "-m", "olive", "convert-adapters", "--disable_telemetry"]
        + ["-a", str(exports.folder / "lora olive"), "-o", str(out)],
        check=True,
        capture_output=True,
    )
    theirs = onnxruntime.AdapterFormat.read_adapter(f"{out}.onnx_adapter").get_parameters()
    ours = onnxruntime.AdapterFormat.read_adapter(str(genai_folder / "law.onnx_adapter")).get_parameters()
    assert theirs.keys() == ours.keys()
    for name in ours:  # theirs is of one rank: zeros beyond ours
        a, b = ours[name].numpy(), theirs[name].numpy()
        inside = tuple(slice(size) for size in a.shape)
        np.testing.assert_array_equal(b[inside], a)
        assert np.count_nonzero(b) == np.count_nonzero(a)


# --- llama.cpp ---------------------------------------------------------------------------------------------


def gguf_names(path: Path, arch) -> tuple[dict[str, np.ndarray], float]:
    """The tensors and the alpha of a LoRA in llama.cpp's format."""
    import gguf

    reader = gguf.GGUFReader(path)
    assert reader.get_field(gguf.Keys.Adapter.TYPE).contents() == "lora"
    assert reader.get_field(gguf.Keys.General.ARCHITECTURE).contents() == gguf.MODEL_ARCH_NAMES[arch]
    return {t.name: np.array(t.data) for t in reader.tensors}, reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents()


def test_llama_cpp_scales_and_names_what_is_written_as_it_was_trained(exports, tmp_path):
    """A LoRA's way into llama.cpp: tensors by its names, the rows of queries and keys paired for its rotation, and one
    alpha for all; at run time W x + alpha / rank * B (A x). LLAMA_CPP names a checkout, whose converter then runs."""
    gguf = pytest.importorskip("gguf")
    save_lora(exports.models["base"], tmp_path / "lora", adapter=exports.folder / "law")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    arch, heads = (
        gguf.MODEL_ARCH.LLAMA,
        {"q_proj": LLAMA["num_attention_heads"], "k_proj": LLAMA["num_key_value_heads"]},
    )
    if checkout := os.environ.get("LLAMA_CPP"):
        subprocess.run(
            [sys.executable, f"{checkout}/convert_lora_to_gguf.py", str(tmp_path / "lora"), "--outtype", "f32"]
            + ["--base", str(exports.folder / "base"), "--outfile", str(tmp_path / "lora.gguf")],
            check=True,
        )
    else:
        write_gguf(tmp_path / "lora.gguf", tmp_path / "lora", arch, heads, config["lora_alpha"])
    tensors, alpha = gguf_names(tmp_path / "lora.gguf", arch)
    names = gguf.get_tensor_name_map(arch, 1)
    base, model = exports.models["base"], exports.models["law"]
    with merged(model):
        trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, W in base.named_parameters():
        there = names.get_name(name, try_suffixes=(".weight",))
        if f"{there}.lora_a" not in tensors:
            assert torch.equal(trained[name], W)
            continue
        A, B = (torch.from_numpy(tensors.pop(f"{there}.lora_{side}")).double() for side in "ab")
        delta = alpha / A.shape[0] * (B @ A)
        kind = name.split(".")[-2]
        want = paired(trained[name].detach(), heads.get(kind)).double() - paired(W.detach(), heads.get(kind)).double()
        # the trained weight is a rounded sum
        assert ((delta - want).abs() <= U32 * trained[name].abs().max()).all(), name
    assert not tensors


def paired(W: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows of each head in the order of llama.cpp's rotation: the two halves of a head's channels interleaved."""
    return W.view(heads, 2, -1, *W.shape[1:]).transpose(1, 2).reshape(W.shape) if heads else W


def write_gguf(path: Path, folder: Path, arch, heads: dict[str, int], alpha: float) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(arch, 1)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        there = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if side == "B":
            tensor = paired(tensor, heads.get(layer.rsplit(".", 1)[-1]))
        writer.add_tensor(f"{there}.lora_{side.lower()}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- vLLM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "pattern"])
@pytest.mark.parametrize("ranks", ["exact", "vllm"])
def test_the_rules_of_vllm_give_the_delta(exports, tmp_path, layout, ranks):
    """vLLM itself needs more than a test installs: these are the rules of its loader (vllm/lora: peft_helper.py,
    lora_model.py, lora_weights.py). Its config has r, lora_alpha and target_modules, no bias, no DoRA, nothing saved
    beside; a tensor's name is the module's and the factor's; B is scaled by lora_alpha / r once, whatever the rank of a
    tensor; each pair goes into a buffer of max_lora_rank, which is one of a list; q, k and v, and gate and up, are
    packed, each in its own part."""
    save_lora(exports.models["base"], tmp_path / "lora", layout, ranks, adapter=exports.folder / "law")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not config["use_dora"] and not config["use_rslora"]
    assert not config.get("modules_to_save")
    scale = config["lora_alpha"] / config["r"]
    card = (tmp_path / "lora" / "README.md").read_text()
    limit = int(re.search(r"--max-lora-rank (\d+) ", card)[1])
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
        module, side = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name).groups()
        pairs.setdefault(module, {})[side] = tensor
    base, model = exports.models["base"], exports.models["law"]
    with merged(model):
        trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert pairs.keys() <= linear and config["r"] <= limit
    for name, W in base.named_parameters():
        layer = name.removesuffix(".weight")
        delta = torch.zeros_like(W).double()
        if layer in pairs:
            A, B = pairs[layer]["lora_A"], pairs[layer]["lora_B"] * scale
            held_A, held_B = torch.zeros(limit, A.shape[1]), torch.zeros(B.shape[0], limit)
            held_A[: A.shape[0]], held_B[:, : B.shape[1]] = A, B
            delta = held_B.double() @ held_A.double()
        assert ((delta - (trained[name].double() - W.double())).abs() <= U32 * trained[name].abs()).all(), name


# --- a browser ---------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_):
        pass


def test_a_browser_runs_a_merged_export(exports, tmp_path):
    """examples/web/index.html in headless Chromium, on onnxruntime-web: the tokens are those of the merged model."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    dist = os.environ.get("ONNXRUNTIME_WEB")
    if not browser or not dist:
        pytest.skip("needs Chromium, and ONNXRUNTIME_WEB naming the dist folder of onnxruntime-web")
    model = exports.models["law"]
    export_onnx(model, tmp_path / "model.onnx", {"input_ids": tokens(1, 5)}, cache=True)
    shutil.copy(ROOT / "examples" / "web" / "index.html", tmp_path)
    (tmp_path / "node_modules" / "onnxruntime-web").mkdir(parents=True)
    (tmp_path / "node_modules" / "onnxruntime-web" / "dist").symlink_to(Path(dist).resolve())
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            page = f"http://127.0.0.1:{server.server_port}/?tokens={','.join(map(str, PROMPT))}&new={NEW}"
            shown = subprocess.run(
                [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
                + ["--virtual-time-budget=60000", "--dump-dom", page],
                capture_output=True,
                text=True,
                timeout=120,
            ).stdout
        finally:
            server.shutdown()
    assert json.loads(re.search(r'<pre id="out">(.*?)</pre>', shown, re.S)[1]) == exports.expected["law"]


# --- a fresh process ---------------------------------------------------------------------------------------

READER = """
import json, sys
import numpy as np, onnxruntime, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

given, ids = json.loads(sys.argv[1]), torch.tensor([json.loads(sys.argv[2])])
made = {}
with torch.no_grad():
    for name, folder in given["folders"].items():
        made[name] = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    for name, (base, folder) in given["peft"].items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        made[name] = model(ids).logits
        made[name + " merged"] = model.merge_and_unload()(ids).logits
for name, file in given["onnx"].items():
    made[name] = onnxruntime.InferenceSession(file).run(["logits"], {"input_ids": ids.numpy()})[0]
assert not [m for m in sys.modules if m.startswith("s2ft")]
np.savez(sys.argv[3], **{name: np.asarray(values) for name, values in made.items()})
"""


def test_every_export_is_read_by_a_process_that_knows_nothing_of_this_package(exports, tmp_path):
    base, law = exports.models["base"], exports.models["law"]
    torch.manual_seed(0)
    experts = MixtralForCausalLM(MixtralConfig(**{**LLAMA, "num_hidden_layers": 1}, num_local_experts=4)).eval()
    experts.save_pretrained(tmp_path / "experts")
    moe = copy.deepcopy(experts)
    s2ft.prepare(moe, {"input_ids": tokens()}, s2ft.S2FTConfig(targets={"moe.out": 3, "moe.in": 2}))
    randomize(moe)
    given = {
        "folders": {"merged": save_merged(law, tmp_path / "merged"), "moe": save_merged(moe, tmp_path / "moe")},
        "peft": {
            "lora": (exports.folder / "base", save_lora(law, tmp_path / "lora")),
            "shira": (exports.folder / "base", save_shira(base, tmp_path / "shira", adapter=exports.folder / "law")),
            "moe lora": (tmp_path / "experts", save_lora(moe, tmp_path / "moe lora")),
        },
        "onnx": {"onnx": export_onnx(law, tmp_path / "model.onnx", {"input_ids": tokens(1, 5)})},
    }
    given["folders"]["checkpoint"] = tmp_path / "checkpoint"
    merge_checkpoint(exports.folder / "base", [exports.folder / "law"], tmp_path / "checkpoint")
    subprocess.run(
        [sys.executable, "-c", READER, json.dumps(given, default=str), json.dumps(PROMPT), str(tmp_path / "out.npz")],
        check=True,
        cwd=tmp_path,
    )
    read = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        want = {False: law(torch.tensor([PROMPT])).logits, True: moe(torch.tensor([PROMPT])).logits}
    assert len(read) == 10
    for name in read:
        logits = want["moe" in name]
        error = 64 * 10 * U32 * float(logits.abs().max())  # float32 sums of at most 64 products, through ten layers
        torch.testing.assert_close(torch.from_numpy(read[name]), logits, rtol=0, atol=error, msg=name)
