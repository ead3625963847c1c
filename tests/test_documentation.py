"""The pages say what happens: their Python runs, their commands exist, their links lead somewhere.

Marks in a page, in a comment of HTML above a block of Python, which readers do not see:
`not run: why`, `raises` (the block fails with the text below it), `setup: code` (runs before it).
A block of `text` right below one of Python is what that prints, with `...` for what differs.
"""

import ast
import contextlib
import io
import itertools
import re
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
import yaml
from small import hf
from test_data import tiny_tokenizer

import s2ft_compile as s2ft
from s2ft_compile.exporters import registration

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# How many blocks of Python a page has that no test runs from it; each says why.
NOT_RUN = {"docs/deployment.md": 3, "docs/devices.md": 1, "docs/quantized.md": 2, "docs/quickstart.md": 1}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. marks: what comments above it say. below: the text right below it, if any."""

    kind: str
    code: str
    line: int
    marks: dict[str, str]
    below: str | None


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (not run|raises|setup)(?:: (.*?))? -->")


def blocks(text: str) -> list[Block]:
    parts, fences = [], list(FENCE.finditer(text))
    for i, fence in enumerate(fences):
        between = text[fences[i - 1].end() if i else 0 : fence.start()]
        above = re.search(r"(?:<!--[^\n]*-->\n)*$", between).group(0)
        after = fences[i + 1] if i + 1 < len(fences) else None
        joined = after and after[1] == "text" and not text[fence.end() : after.start()].strip()
        line = text[: fence.start()].count("\n") + 2
        parts.append(Block(fence[1], fence[2], line, dict(MARK.findall(above)), after[2] if joined else None))
    return parts


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block.kind == "python"]


def says(pattern: str, text: str) -> bool:
    """Whether a text is what a page shows of it, `...` being anything."""
    return re.search(".*".join(map(re.escape, re.split(r"\s*\.\.\.\s*", pattern.strip()))), text, re.DOTALL) is not None


# --- Python -------------------------------------------------------------------------------------------------------


def llama(layers: int = 1):
    return hf("llama", num_hidden_layers=layers, vocab_size=320, max_position_embeddings=128)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages name, and the names that their code begins with. No Inductor: seconds less."""
    monkeypatch.chdir(tmp_path)
    tokenizer, plain = tiny_tokenizer(), torch.compile
    llama().save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    Path("BASE").symlink_to("my-model")
    batch = dict(tokenizer(["one example", "and another"], return_tensors="pt", padding=True))

    def quick(*args, backend="inductor", options=None, **kwargs):
        options = {"inner": "aot_eager", **(options or {})} if backend == "s2ft" else options
        return plain(*args, backend=backend, options=options, **kwargs)

    monkeypatch.setattr(torch, "compile", quick)
    monkeypatch.setattr("s2ft_compile.backend._numbers", itertools.count())  # as in a process of its own
    exporters = dict(registration.REGISTERED)
    yield {"s2ft": s2ft, "torch": torch, "model": llama(), "base": llama(), "batch": batch, "fresh": llama} | {
        "data": [batch],
        "batches": [{**batch, "labels": batch["input_ids"]}],
        "config": s2ft.S2FTConfig({"ffn.in": 2, "ffn.out": 2}),
    }
    for name in registration.REGISTERED.keys() - exporters:
        delattr(s2ft.exporters, name)
        del registration.REGISTERED[name]


def processes(names: dict):
    """One process in its group, for pages that speak of several."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import AdamW

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    names |= {"fully_shard": fully_shard, "DistributedDataParallel": DistributedDataParallel, "AdamW": AdamW}
    names["layered"] = partial(llama, 2)


def adapters(names: dict, called=("law", "code", "chat")):
    """Adapters of the base model, and prompts."""
    for seed, name in enumerate(called):
        model = llama()
        s2ft.prepare(model, names["batch"], s2ft.S2FTConfig({"ffn.out": 2}, seed=seed))
        s2ft.exporters.save_adapter(model, f"adapters/{name}")
    ids = torch.ones(3, 4, dtype=torch.long)
    names |= {"three_prompts": {"input_ids": ids, "attention_mask": ids, "max_new_tokens": 2, "pad_token_id": 0}}


PRELUDES = {
    "docs/devices.md": processes,
    "docs/adapters.md": adapters,
    "docs/deployment.md": partial(adapters, called=("law",)),
}


@pytest.mark.parametrize("name", [name for name, page in zip(NAMES, PAGES) if python(page)])
def test_python_runs(name, workplace):
    try:
        PRELUDES.get(name, lambda names: None)(workplace)
        for block in python(ROOT / name):
            if "not run" not in block.marks:
                run(block, name, workplace)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(block: Block, name: str, names: dict) -> None:
    exec(block.marks.get("setup", ""), names)
    code = compile("\n" * (block.line - 1) + block.code, name, "exec")
    if "raises" in block.marks:
        with pytest.raises(Exception) as raised:
            exec(code, names)
        shown = f"{type(raised.value).__name__}: {raised.value}"
    else:
        with contextlib.redirect_stdout(printed := io.StringIO()):
            exec(code, names)
        shown = printed.getvalue()
    assert block.below is None or says(block.below, shown), f"{name}:{block.line} shows\n{block.below}\nand is\n{shown}"
    assert block.below is not None or "raises" not in block.marks, f"{name}:{block.line} shows no error"


def test_blocks_that_are_not_run_say_why():
    pages = {name: python(page) for name, page in zip(NAMES, PAGES)}
    reasons = {name: [b.marks["not run"] for b in all_of if "not run" in b.marks] for name, all_of in pages.items()}
    print("\n".join(f"{name}: {why}" for name, all_of in reasons.items() for why in all_of))
    assert {name: len(all_of) for name, all_of in reasons.items() if all_of} == NOT_RUN
    assert all(len(why) > 10 for all_of in reasons.values() for why in all_of)


def test_a_page_that_is_wrong_is_noticed(workplace):
    page = "```python\n{}\n```\n\n```text\n{}\n```\n"
    run(blocks(page.format("print(1, 22, 3)", "1 ... 3"))[0], "right", workplace)
    for text in (page.format("print(1)", "2"), "<!-- raises -->\n" + page.format("1 / 1", "ZeroDivisionError")):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run(blocks(text)[0], "wrong", workplace)


# --- commands -----------------------------------------------------------------------------------------------------


def commands() -> dict:
    """The commands by their names, "export onnx" too."""
    from s2ft_compile.cli.app import app

    def leaves(command, path=()):
        if not hasattr(command, "commands"):
            return {" ".join(path): command}
        return {k: v for name, one in command.commands.items() for k, v in leaves(one, (*path, name)).items()}

    return leaves(typer.main.get_command(app))


def lines_of_shell(page: Path) -> list[str]:
    text = "\n".join(b.code for b in blocks(page.read_text(encoding="utf-8")) if b.kind in ("", "sh"))
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("s2ft ")]


def parse(line: str) -> None:
    """Raises where the command does not exist, or does not take what is typed."""
    words, known = shlex.split(line, comments=True)[1:], commands()
    while words[0] == "--import":
        words = words[2:]
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
    assert name, f"no command {words}"
    known[name].make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize("name", [name for name, page in zip(NAMES, PAGES) if lines_of_shell(page)])
def test_commands_parse(name):
    for line in lines_of_shell(ROOT / name):
        parse(line)


@pytest.mark.parametrize("line", ["s2ft traim x", "s2ft train --target x", "s2ft export onnx --model x"])
def test_commands_that_do_not_exist_are_noticed(line):
    with pytest.raises(Exception, match="no command|(?i:no such option|missing)"):
        parse(line)


def test_commands_in_sentences_exist():
    known = commands()
    options = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in known.items()}
    for name, page in zip(NAMES, PAGES):
        for line in re.findall(r"`s2ft ((?:--import \S+ )?[a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
            words = re.sub(r"^--import \S+ ", "", line).split()
            named = [n for n in (" ".join(words[:2]), words[0]) if n in known or n == "export"]
            assert named, f"{name}: s2ft {line}"
            typed = set(re.findall(r"--[a-z0-9-]+", line)) - {"--help", "--import"}
            assert typed <= options.get(named[0], typed), f"{name}: s2ft {line}"


def test_the_page_of_commands_has_all_of_them():
    sections = re.split(r"^## s2ft ", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    written = {section.split("\n")[0]: section for section in sections}
    known = commands()
    assert written.keys() == known.keys()
    for name, command in known.items():
        asked = {o for p in command.params for o in p.opts if o.startswith("--")} - {"--debug", "--help"}
        assert asked == set(re.findall(r"^\| `(--[a-z0-9-]+)`", written[name], re.MULTILINE)), name


# --- links, names and messages --------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower(), flags=re.ASCII).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.is_file(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target), f"{name}: {link}"


def test_every_page_is_in_the_navigation():
    def pages(nav):
        return [p for one in nav for v in one.values() for p in (pages(v) if isinstance(v, list) else [v])]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(Path(name).name for name in NAMES if name.startswith("docs/"))


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", text, re.MULTILINE))
    doors = (s2ft, s2ft.exporters, s2ft.rules, s2ft.selections, s2ft.quantized)
    assert {name for door in doors for name in door.__all__} - {"exporters"} <= shown


def test_the_messages_that_are_explained_exist():
    """In the source, one after the other what stands between the dots, in one text of the program."""
    folders = [ROOT / name for name in ("s2ft_compile", "exporters", "passes", "kernels")]
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    texts = {text for path in sources for text in _texts(ast.parse(path.read_text(encoding="utf-8")))}
    titles = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) >= 25
    assert [title for title in titles if not any(says(title, text) for text in texts)] == []


def _texts(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
