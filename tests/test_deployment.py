"""docs/deployment.md: what it shows runs, in its order, on a tiny model."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from small import hf, randomize, tokens
from test_data import tiny_tokenizer
from typer.testing import CliRunner

import s2ft_compile as s2ft
from s2ft_compile.cli.app import app
from s2ft_compile.exporters import merge_checkpoint, save_adapter

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/deployment.md").read_text(encoding="utf-8"), re.M | re.S)
# programs of others: test_consumers.py follows their rules
OTHERS = ("pip install", "vllm serve", "python convert_lora_to_gguf.py", "llama-server")


def model():
    return hf("llama", num_hidden_layers=1, vocab_size=300, eos_token_id=0, bos_token_id=0, max_position_embeddings=256)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The names of the page: a base model, two adapters of it, and one of them merged."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model().save_pretrained("BASE")
    tokenizer.save_pretrained("BASE")
    for seed, name in enumerate(("law", "chat")):
        tuned = model()
        s2ft.prepare(tuned, {"input_ids": tokens()}, s2ft.S2FTConfig(targets={"ffn.out": 3, "ffn.in": 2}, seed=seed))
        randomize(tuned, seed)
        save_adapter(tuned, f"adapters/{name}")
    merge_checkpoint("BASE", ["adapters/law"], "merged")


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_page_run(folder):
    values, serving = {"s2ft": s2ft, "base": model(), "batch": {"input_ids": tokens()}}, None
    try:
        for language, block in BLOCKS:
            if language == "python":
                address = serving and next(line for line in serving.stderr if " at http" in line).split()[2].rstrip(",")
                exec(block.replace("http://127.0.0.1:8000", address or ""), values)
                if serving:
                    assert values["client"].models.list().data[0].id == "BASE"
                    serving.terminate()
                    assert serving.wait(60) is not None
                    serving = None
                continue
            for line in block.splitlines():
                serving = run(line) or serving
    finally:
        if serving:
            serving.kill()
    assert {"onnx", "both", "onnx8", "web", "lora", "padded"} <= {path.name for path in Path().iterdir()}


def run(line: str) -> subprocess.Popen | None:
    """A server is left running."""
    words = shlex.split(line)
    if line.startswith("s2ft serve"):
        code = [sys.executable, "-c", "from s2ft_compile.cli.app import app; app()"]
        return subprocess.Popen([*code, *words[1:], "--port", "0"], stderr=subprocess.PIPE, text=True)
    if line.startswith("s2ft "):
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    elif line.startswith("python examples/"):
        if find_spec("onnxruntime_genai"):
            subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True)
    else:
        assert line.startswith(OTHERS), f"nobody runs {line!r}"
    return None
