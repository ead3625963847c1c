"""Data files and tokens: what is accepted, what a block holds, and what each error says."""

import json
import os

import pytest
import torch

from s2ft_compile.cli.data import IGNORE, cut, example_inputs, load_config, load_model, pad, split, tokenize
from s2ft_compile.cli.records import Records, read_records
from s2ft_compile.errors import ConfigError

TEXT = "the quick brown fox jumps over the lazy dog. "
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


def tiny_tokenizer(vocabulary: int = 300):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([TEXT * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


# Files


def test_plain_text_is_one_record(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("{not json}\nsecond line\n")
    assert read_records(path) == Records("text", ({"text": "{not json}\nsecond line\n"},))


@pytest.mark.parametrize(
    "form, row",
    [
        ("text", {"text": "a", "extra": 1}),
        ("prompt", {"prompt": "", "completion": "b"}),
        ("messages", {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}),
    ],
)
def test_jsonl_forms(tmp_path, form, row):
    records = read_records(lines(tmp_path / "data.jsonl", row, "", row))
    assert records == Records(form, (row, row))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "b"', "not JSON"),
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
        ("[1]", "a JSON object was expected, found a list"),
        ("{}", "an empty object"),
        ('{"txt": "b"}', "found 'txt'"),
        ('{"text": 3}', "'text' is a number, a string was expected"),
        ('{"text": ""}', "'text' is empty"),
        ('{"prompt": "b"}', "'completion' is missing"),
        ('{"prompt": "b", "completion": null}', "'completion' is null"),
        ('{"prompt": "b", "completion": ""}', "'completion' is empty"),
        ('{"messages": []}', "an empty list"),
        ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "b"}]}', "no message has the role 'assistant'"),
        ('{"prompt": "b", "completion": "c"}', "has 'prompt', but line 1 has 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = lines(tmp_path / "data.jsonl", {"text": "a"}, line)
    with pytest.raises(ConfigError) as error:
        read_records(path)
    assert f"{path}, line 2" in str(error.value) and message in str(error.value) and '"prompt"' in str(error.value)


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty"), (b" \n", "is empty"), (b"a\xff", "not UTF-8 text (byte 1)")]
)
@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_records(tmp_path / name)


@pytest.mark.parametrize(
    "row, form, expected",
    [
        ({"instruction": "a", "input": "", "output": "b", "text": "all"}, "prompt", ("completion", "b")),
        ({"instruction": "a", "context": "c", "response": "b"}, "prompt", ("completion", "b")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "messages", None),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            None,
        ),
    ],
)
def test_forms_of_other_projects(tmp_path, row, form, expected):
    records = read_records(lines(tmp_path / "data.jsonl", row, row))
    assert records.form == form and len(records.rows) == 2
    if form == "messages":
        assert records.rows[0]["messages"] == [{"role": r, "content": c} for r, c in zip(("user", "assistant"), "ab")]
    else:
        assert records.rows[0][expected[0]] == expected[1] and records.rows[0]["prompt"].endswith("### Response:\n")
        assert ("### Input:\nc" in records.rows[0]["prompt"]) == ("context" in row)


@pytest.mark.parametrize(
    "row, form",
    [
        ({"messages": None, "prompt": "a", "completion": "b"}, "prompt"),
        ({"instruction": None, "output": None, "text": "b"}, "text"),
        ({"prompt": "a", "completion": "b", "label": "sports"}, "prompt"),
    ],
)
def test_what_a_row_leaves_empty_is_not_its_form(tmp_path, row, form):
    assert read_records(lines(tmp_path / "data.jsonl", row)) == Records(form, (row,))


def test_prose_that_looks_a_little_like_rows_is_prose(tmp_path):
    for text in ("[1] a note\n", "prompt, and more\n", '{"a": 1}\n', "text\nmore\n", "[]\n", "[1]\n", "a,b\n"):
        (tmp_path / "a.txt").write_text(text)
        assert read_records(tmp_path / "a.txt") == Records("text", ({"text": text},))


@pytest.mark.parametrize(
    "turns", [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], [{"role": "assistant", "content": "b"}]]
)
def test_a_system_prompt_beside_a_conversation_is_its_first_message(tmp_path, turns):
    row = {"system": "be brief", "conversations": turns}
    (record,) = read_records(lines(tmp_path / "data.jsonl", row)).rows
    assert record["messages"][0] == {"role": "system", "content": "be brief"}
    assert len(record["messages"]) == 1 + len(turns) and record["messages"][-1]["role"] == "assistant"


def test_one_set_of_rows_in_every_kind_of_file(tmp_path, monkeypatch):
    """JSON lines, an array, CSV, TSV, parquet, a saved data set, a folder of files and a name on the hub."""
    import datasets

    rows = [{"prompt": 'a "quoted",\nline', "completion": f"b{i}"} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    lines(tmp_path / "a.jsonl", *rows)
    dataset.to_csv(tmp_path / "a.csv")
    dataset.to_csv(tmp_path / "a.tsv", sep="\t")
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    given = [tmp_path / name for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "saved", "splits")]
    splits = {"train": dataset.select([0]), "test": dataset}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits if name == "owner/name" else fail())

    def fail():
        raise RuntimeError("no connection\nmore")

    for source in (*given, "owner/name:test"):
        assert read_records(source) == Records("prompt", tuple(rows)), source
    assert len(read_records("owner/name").rows) == 1
    with pytest.raises(ConfigError, match="owner/name:dev has the splits train, test; name one"):
        read_records("owner/name:dev")
    with pytest.raises(ConfigError, match="other/name cannot be loaded: no connection; valid"):
        read_records("other/name")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "header,of\nsomething,else\n", "a.csv, line 2: none of the known fields, found 'header', 'of'"),
        ("a.csv", "prompt,completion\na\n", "line 2: 1 fields, where the header has 2"),
        ("a.csv", "text,text\na,b\n", "two columns have one name"),
        ("a.csv", 'text\n"a\n', "not a table"),
        ("a.json", '{"data":\n [1]\n}', "one JSON object over several lines, with 'data'"),
        ("a.json", "[1]", "row 1: a JSON object was expected, found a number"),
        ("a.json", "[", "not JSON"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", "a number that is too long"),
        ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "preferences.*DPOTrainer"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "label": false}', "KTOTrainer"),
        ("a.csv", "prompt,completion,label\na,b,False\n", "KTOTrainer"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "label": 1}', "KTOTrainer"),
        ("a.jsonl", '{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "'history' beside 'instruction'"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "b", "weight": 0}]}', "has the weight 0"),
        ("a.jsonl", '{"tools": "f", "messages": [{"role": "assistant", "content": "b"}]}', "'tools' is a string"),
        ("a.jsonl", '{"conversations": [{"from": "alien", "value": "b"}]}', "a turn is from 'alien'; known are human"),
        ("a.jsonl", '{"instruction": "a", "output": 3}', "'output' is a number"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}', "holds JSON lines, with 'text', .* name it .jsonl"),
        ("a.txt", '[\n {"text": "a"}\n]', "holds JSON, with 'text', .* name it .json"),
        ("a.txt", "prompt,completion\na,b\n", "holds a table of 'prompt', 'completion', .* name it .csv"),
        ("a.txt", '"prompt"\t"completion"\na\tb\n', "holds a table of 'prompt', 'completion', .* name it .tsv"),
        ("a.parquet", "PAR1", "is not parquet"),
        ("a.html", "<p>", "is html, which is not read; convert it"),
        ("a.csv.gz", "", "is gz, which is not read"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_records(tmp_path / name)
    assert '{"prompt": "...", "completion": "..."}' in str(error.value) and len(str(error.value)) < 1500


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.jsonl", '{"text": "b"}'), ("a.txt", "b")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_records(tmp_path / name).rows == ({"text": "b"},)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; valid: a plain text file"):
        read_records(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="is a folder"):
        read_records(tmp_path)


# Tokens


def test_text_is_cut_without_loss_or_overlap(tokenizer):
    documents = [TEXT * 9, TEXT * 7]
    blocks = tokenize(Records("text", tuple({"text": t} for t in documents)), tokenizer, 16)
    expected = [i for t in documents for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert blocks.input_ids.shape == (len(expected) // 16, 16)
    assert blocks.input_ids.flatten().tolist() == expected[: len(blocks) * 16]
    assert torch.equal(blocks.input_ids, blocks.labels) and blocks.labels.dtype == torch.int64


def test_too_little_text_names_a_length_that_works():
    with pytest.raises(ConfigError, match="has 9 tokens.*at most 4"):
        cut([[1, 2, 3], [4] * 6], 5)
    assert len(cut([[1, 2, 3], [4] * 6], 4)) == 2


def test_only_the_completion_is_learned(tokenizer):
    rows = ({"prompt": "the quick ", "completion": "brown fox"}, {"prompt": "", "completion": "lazy dog"})
    blocks = tokenize(Records("prompt", rows), tokenizer, 64)
    assert blocks.input_ids.shape[1] % 16 == 0
    for row, ids, labels in zip(rows, blocks.input_ids, blocks.labels):
        learned = labels[labels != IGNORE]
        assert tokenizer.decode(learned[:-1]) in (row["completion"], " " + row["completion"])
        assert learned[-1] == tokenizer.eos_token_id
        kept = ids[: len(ids) - int((labels.flip(0) == IGNORE).cumprod(0).sum())]
        assert tokenizer.decode(kept[:-1]) == row["prompt"] + row["completion"]


def test_only_the_assistant_is_learned(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    messages = [
        {"role": r, "content": c}
        for r, c in (("user", "fox"), ("assistant", "dog"), ("user", "the"), ("assistant", "lazy"))
    ]
    blocks = tokenize(Records("messages", ({"messages": messages},) * 2), tokenizer, 64)
    learned = blocks.labels[0][blocks.labels[0] != IGNORE]
    assert tokenizer.decode(learned) == "doglazy"
    assert (blocks.labels == blocks.input_ids)[blocks.labels != IGNORE].all()


@pytest.mark.parametrize("template", [CHAT, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_a_template_is_given_the_tools(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + template
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    row = {"messages": messages, "tools": [{"name": "lookup"}]}
    blocks = tokenize(Records("messages", (row, row)), tokenizer, 64)
    assert tokenizer.decode(blocks.input_ids[0]).startswith("[lookup]")
    assert tokenizer.decode(blocks.labels[0][blocks.labels[0] != IGNORE]) == "dog"


@pytest.mark.parametrize("turns", ["ua", "uaua", "sua", "aua"])
def test_an_unmarked_chat_template_never_learns_the_users_turns(turns):
    """What an assistant's turn adds to the conversation before it, with a template that has nothing but this."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": roles[t], "content": f"{roles[t]} {i}"} for i, t in enumerate(turns)]
    blocks = tokenize(Records("messages", ({"messages": messages},) * 2), tokenizer, 128)
    learned = tokenizer.decode(blocks.labels[0][blocks.labels[0] != IGNORE])
    expected = "".join(f"assistant {i}<|end|>" for i, t in enumerate(turns) if t == "a")
    if turns[0] == "a":  # nothing comes before it, so its marker is its own
        expected = "<assistant>" + expected
    assert learned == expected


def test_a_chat_template_whose_turns_cannot_be_told_apart_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    with pytest.raises(ConfigError, match="neither marks what the assistant says .{% generation %}.*prompt"):
        tokenize(Records("messages", ({"messages": messages},) * 2), tokenizer, 64)


def test_messages_need_a_chat_template(tokenizer):
    messages = [{"role": "assistant", "content": "dog"}]
    with pytest.raises(ConfigError, match="no chat template; use the fields 'prompt' and 'completion'"):
        tokenize(Records("messages", ({"messages": messages},)), tokenizer, 64)


def test_padding_cuts_drops_and_counts():
    examples = [
        ([1] * 40, [False] * 30 + [True] * 10),
        ([2] * 5, [False, True, True, True, True]),
        ([3] * 9, [True] * 9),
    ]
    blocks = pad(examples, 20, pad_id=0)
    assert (len(blocks), blocks.truncated, blocks.dropped) == (2, 1, 1)  # the first learns only beyond 20
    assert blocks.input_ids.shape == (2, 16)
    assert blocks.labels[0].tolist() == [IGNORE, 2, 2, 2, 2] + [IGNORE] * 11
    assert blocks.input_ids[0].tolist() == [2] * 5 + [0] * 11
    with pytest.raises(ConfigError, match="1 of 2 examples have something to learn within 4 tokens.*longest has 5"):
        pad([([2] * 5, [True] * 5), ([2] * 4, [True, False, False, False])], 4, pad_id=0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_split_is_a_partition(shuffle):
    blocks = cut([list(range(400))], 4)
    training, held_out = split(blocks, 0.1, seed=3, shuffle=shuffle)
    assert (len(training), len(held_out)) == (90, 10)
    both = torch.cat([training.input_ids, held_out.input_ids])
    assert torch.equal(both.sort(0).values, blocks.input_ids)
    assert shuffle or torch.equal(both, blocks.input_ids)
    again = split(blocks, 0.1, seed=3, shuffle=shuffle)[1]
    assert torch.equal(again.input_ids, held_out.input_ids)
    assert len(split(cut([list(range(8))], 4), 0.9, 0, shuffle)[0]) == 1


def test_packed_examples_have_the_losses_of_single_ones(tokenizer):
    """Each example starts at position 0, looks at none before it, and its first token is not predicted."""
    from small import hf

    rows = tuple({"prompt": TEXT[: 9 + 5 * i], "completion": TEXT[9 + 5 * i : 20 + 9 * i]} for i in range(8))
    single, packed = (tokenize(Records("prompt", rows), tokenizer, 48, packing) for packing in (False, True))
    assert len(packed) < len(single) == 8 and packed.dropped == 0
    model = hf("llama", vocab_size=320, max_position_embeddings=64)

    def total(blocks):
        with torch.no_grad():
            loss = model(**{k: v for k, v in blocks[:].items()}).loss
        return loss * (blocks.labels[:, 1:] != IGNORE).sum()

    assert sorted(single.labels[single.labels != IGNORE]) == sorted(packed.labels[packed.labels != IGNORE])
    torch.testing.assert_close(total(packed), total(single), rtol=1e-5, atol=0)
    torch.testing.assert_close(total(single.take([0, 1])) + total(single.take(range(2, 8))), total(single))


def test_packing_needs_two_blocks(tokenizer):
    rows = tuple({"prompt": "the ", "completion": "fox"} for _ in range(4))
    with pytest.raises(ConfigError, match="all 4 examples fit into one block of 64"):
        tokenize(Records("prompt", rows), tokenizer, 64, packing=True)


# Models


def test_example_inputs_of_decoders_and_encoder_decoders():
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    inputs = example_inputs(gpt2)
    assert set(inputs) == {"input_ids"}
    assert inputs["input_ids"].shape == (2, 16) and inputs["input_ids"].dtype == torch.int64
    assert 0 <= inputs["input_ids"].min() and inputs["input_ids"].max() < 20
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20))
    assert set(example_inputs(t5)) == {"input_ids", "decoder_input_ids"}
    t5(**example_inputs(t5))


def test_example_inputs_of_other_modules():
    class Features(torch.nn.Linear):
        main_input_name, dummy_inputs = "features", {"features": torch.ones(1, 2)}

    assert list(example_inputs(Features(2, 2))) == ["features"]
    with pytest.raises(ConfigError, match="no example inputs are known for Linear: it takes input_ids"):
        example_inputs(torch.nn.Linear(2, 2))


def test_a_model_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="config.json is missing .found: nothing"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model could be loaded from"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="no model could be loaded from nowhere/at-all"):
        load_model("nowhere/at-all")


def test_weights_that_were_cut_off_are_one_line(tmp_path):
    from small import hf

    hf("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(ConfigError, match="no model could be loaded from .*: Error while deserializing header"):
        load_model(tmp_path)
