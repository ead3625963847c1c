"""Data sets as people have them, recognised by name or refused: text, JSON, CSV and parquet files, hub data sets.

A row is of one of four forms, whatever its file: `text`; `prompt` with `completion`; `messages`; and those that are
brought to one of these, Alpaca's instructions and ShareGPT's conversations. Preferences are refused: they are no text
to learn, and training on them takes another loss.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from s2ft_compile.errors import ConfigError

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
NO_TEXT = tuple(
    ".zip .gz .bz2 .xz .zst .7z .tar .arrow .xlsx .xls .ods .pdf .docx .html .htm .xml .yaml .yml .pkl .pt .npy "
    ".safetensors".split()
)
FORMS = (
    '{"text": "..."}',
    '{"prompt": "...", "completion": "..."}',
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    '{"instruction": "...", "input": "...", "output": "..."}',
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
)
VALID = (
    "valid: a plain text file; .jsonl, .json, .csv, .tsv or .parquet, or a hub data set OWNER/NAME[:SPLIT], whose rows "
    f"are all {', or all '.join(FORMS)}"
)
FIELDS = {"text", "prompt", "messages", "instruction", "conversations", "conversation", "chosen"}  # a row has one
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)


@dataclass(frozen=True)
class Records:
    """The rows of a data set, all of one form: `text`, `prompt` (with `completion`) or `messages`."""

    form: str
    rows: tuple[Mapping[str, Any], ...]


def read_records(source: str | Path) -> Records:
    """A file, or a hub data set, as records. Raises `ConfigError` with the row and the valid forms."""
    path = Path(source)
    if not path.exists():
        return _of_rows(str(source), _from_hub(str(source)))
    if path.is_dir():
        return _of_rows(str(path), _from_folder(path))
    suffix = path.suffix.lower()
    if suffix in NO_TEXT:
        raise ConfigError(f"data file {path} is {suffix[1:]}, which is not read; convert it. {VALID}")
    if suffix in PARQUET:
        return _of_rows(str(path), _from_parquet(path))
    text = _text(path)
    if suffix in TABLES:
        return _of_rows(str(path), _from_table(path, text, TABLES[suffix]))
    if suffix in JSON_LINES:
        return _of_rows(str(path), _from_json(path, text))
    _check_prose(path, text)
    return Records("text", ({"text": text},))


def _of_rows(source: str, rows: Iterable[tuple[str, Any]]) -> Records:
    """rows: (where, row). All have to be of the first's form."""
    records, first = [], None
    for where, row in rows:
        form, record = _recognised(row, lambda problem: _refuse(f"{source}, {where}: {problem}"))
        first = first or (form, where)
        if form != first[0]:
            _refuse(f"{source}, {where}: has {form!r}, but {first[1]} has {first[0]!r}")
        records.append(record)
    if not records:
        raise ConfigError(f"data set {source} is empty; {VALID}")
    return Records(first[0], tuple(records))


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"{problem}; {VALID}")


# --- where rows come from -------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise ConfigError(f"data file {path} is not UTF-8 text (byte {error.start}); {VALID}") from None
    if not text.strip():
        raise ConfigError(f"data file {path} is empty; {VALID}")
    return text


def _check_prose(path: Path, text: str) -> None:
    """Refuses rows under another name, which would be learned with their braces and commas."""
    first = text.lstrip().split("\n", 1)[0]
    for part, what, name in ((first, "JSON lines", ".jsonl"), (text, "JSON", ".json")):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        row = value[0] if isinstance(value, list) and value else value
        if isinstance(row, dict) and FIELDS & row.keys():
            _refuse(f"data file {path} holds {what}, with {_names(row)}, and would be learned as text: name it {name}")
    columns = [name.strip().strip('"') for name in first.replace("\t", ",").split(",")]
    if len(columns) > 1 and FIELDS & set(columns) and all(name.isidentifier() for name in columns):
        name = ".tsv" if "\t" in first else ".csv"
        _refuse(f"data file {path} holds a table of {_names(columns)}, and would be learned as text: name it {name}")


def _from_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """JSON on each line, or one array of all rows."""
    if text.lstrip().startswith("["):
        rows = _parsed(f"{path}", text)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    if path.suffix.lower() == ".json" and (whole := _object_over_lines(text)) is not None:
        _refuse(f"{path} is one JSON object over several lines, with {_names(whole)}; a list of rows was expected")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(f"{path}, line {number}", line)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        _refuse(f"{where}: not JSON ({error.msg} at {place})")
    except RecursionError:
        _refuse(f"{where}: JSON that is nested too deeply to be read")
    except ValueError as error:  # an integer of thousands of digits
        _refuse(f"{where}: JSON with a number that is too long to be read ({error})")


def _object_over_lines(text: str) -> Mapping | None:
    try:
        json.loads(text.strip().split("\n")[0])
    except (ValueError, RecursionError):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return whole if isinstance(whole, dict) else None
    return None


def _from_table(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    csv.field_size_limit(2**31 - 1)
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            _refuse(f"{path}, line 1: two columns have one name: {_names(header)}")
        for fields in reader:
            if fields and len(fields) != len(header):
                _refuse(f"{path}, line {reader.line_num}: {len(fields)} fields, where the header has {len(header)}")
            if fields:
                yield f"line {reader.line_num}", dict(zip(header, fields))
    except csv.Error as error:
        _refuse(f"{path}, line {reader.line_num}: not a table ({error})")


def _from_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data file {path} is not parquet: {str(error).splitlines()[0]}; {VALID}") from error
    yield from _numbered(table.to_pylist())


def _from_folder(path: Path) -> Iterator[tuple[str, Any]]:
    """What `Dataset.save_to_disk` wrote, or a folder of files as `load_dataset` takes it."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        return _numbered(_split(str(path), _loaded(str(path), datasets.load_from_disk, str(path)), None))
    if not any(file.suffix.lower() in (*JSON_LINES, *TABLES, *PARQUET) for file in path.rglob("*") if file.is_file()):
        raise ConfigError(f"data file {path} is a folder, and no data set; {VALID}")
    return _numbered(_loaded_split(str(path), str(path), None))


def _from_hub(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = source.partition(":")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or Path(name).suffix.lower() in _suffixes():
        raise ConfigError(f"data file {source} does not exist; {VALID}")
    return _numbered(_loaded_split(source, name, split or None))


def _suffixes() -> tuple[str, ...]:
    return (*JSON_LINES, *TABLES, *PARQUET, *NO_TEXT, ".txt", ".md")


def _loaded_split(source: str, name: str, split: str | None) -> Iterable[Mapping]:
    import datasets

    return _split(source, _loaded(source, datasets.load_dataset, name), split)


def _loaded(source: str, load, *arguments) -> Any:
    try:
        return load(*arguments)
    except Exception as error:  # the library's own types are many
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"data set {source} cannot be loaded: {first}; {VALID}") from error


def _split(source: str, data: Any, split: str | None) -> Iterable[Mapping]:
    """One split: the one that is named, or `train`, or the only one."""
    if not isinstance(data, dict):
        return data
    chosen = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else None)
    if chosen not in data:
        raise ConfigError(
            f"data set {source} has the splits {', '.join(data)}; name one, as in OWNER/NAME:{[*data][0]}"
        )
    return data[chosen]


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


# --- what a row is --------------------------------------------------------------------------------------------------


def _recognised(row: Any, refuse) -> tuple[str, Mapping[str, Any]]:
    """(form, row in it)."""
    if not isinstance(row, dict):
        refuse(f"a JSON object was expected, found {kind(row)}")
    given = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} & given:
        refuse(
            f"preferences ({_names(row)}), which this command does not train on; TRL's DPOTrainer does "
            f"(examples/train_dpo.py)"
        )
    if "completion" in given and str(row.get("label")).lower() in ("true", "false", "0", "1"):
        refuse(f"completions that are good or bad by 'label' ({_names(row)}), which TRL's KTOTrainer trains on")
    _check_text(row, refuse)
    present = given if FIELDS & given else row.keys()  # a table of several forms has nothing in the others' columns
    for field in ("messages", "conversations", "conversation"):
        if field in present:
            messages = row[field] if field == "messages" else _from_sharegpt(row, field, refuse)
            _check_messages(messages, refuse)
            if not isinstance(row.get("tools") or [], list):
                refuse(f"'tools' is {kind(row['tools'])}, a list of tools was expected")
            return "messages", {**row, "messages": messages}
    output = next((name for name in ("output", "response") if name in row), None)
    if "instruction" in present and output:
        return "prompt", _from_alpaca(row, output, refuse)
    form = next((form for form in ("prompt", "text") if form in present), None)
    if form is None:
        refuse(f"none of the known fields, found {_names(row) or 'an empty object'}")
    for field in {"text": ("text",), "prompt": ("prompt", "completion")}[form]:
        _check_string(row, field, refuse, may_be_empty=field == "prompt")
    return form, row


def _from_alpaca(row: Mapping, output: str, refuse) -> Mapping[str, str]:
    """The prompt that Alpaca was trained with, and the completion."""
    for field in ("instruction", output):
        _check_string(row, field, refuse)
    if unread := [field for field in ("system", "history") if row.get(field)]:
        refuse(f"{_names(unread)} beside 'instruction', which Alpaca's prompt has no place for; use 'messages'")
    context = row.get("input") or row.get("context") or ""
    if not isinstance(context, str):
        refuse(f"'input' is {kind(context)}, a string was expected")
    prompt = ALPACA.format(
        paired=", paired with an input that provides further context" if context else "",
        instruction=row["instruction"],
        context=f"### Input:\n{context}\n\n" if context else "",
    )
    return {"prompt": prompt, "completion": row[output]}


def _from_sharegpt(row: Mapping, field: str, refuse) -> list[dict[str, str]]:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        refuse(f"{field!r} is {kind(turns)}, a list of turns was expected")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return messages + turns  # messages under another name
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("from", "value")):
            refuse(f"a turn of {field!r} needs the strings 'from' and 'value'")
        if turn["from"] not in SPEAKERS:
            refuse(f"a turn is from {turn['from']!r}; known are {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return messages


def _check_messages(messages: Any, refuse) -> None:
    if not isinstance(messages, list) or not messages:
        refuse(f"'messages' is {kind(messages)}, a list of messages was expected")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            refuse("a message needs the strings 'role' and 'content'")
        if message.get("weight") == 0:
            refuse("a message has the weight 0, and would be learned all the same")
    if all(message["role"] != "assistant" for message in messages):
        refuse("no message has the role 'assistant', so there is nothing to train on")


def _check_string(row: Mapping, field: str, refuse, may_be_empty: bool = False) -> None:
    if not isinstance(row.get(field), str):
        refuse(f"{field!r} is {kind(row[field]) if field in row else 'missing'}, a string was expected")
    if not row[field] and not may_be_empty:
        refuse(f"{field!r} is empty")


def _check_text(row: Any, refuse) -> None:
    """That no string in it holds half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    if any("\ud800" <= c <= "\udfff" for c in json.dumps(row, ensure_ascii=False, default=str)):
        refuse("half of a surrogate pair (\\ud800 to \\udfff), which is no text")


def _names(row: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in list(row)[:8])


def kind(value: Any) -> str:
    """What a JSON value is, for a person."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")
