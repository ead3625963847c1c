"""The adapter as a SHiRA: PEFT loads it and merges to our bits, and what has no room is refused."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from test_lora import assert_peft_gives, no_warnings, tuned  # noqa: F401

import s2ft_compile as s2ft
from s2ft_compile.adapters.format import CONFIG, WEIGHTS
from s2ft_compile.errors import ExportError
from s2ft_compile.exporters import save_adapter, save_shira
from s2ft_compile.exporters.shira import common_r, numbers

ROLES = {"ffn.out": 0.3, "attention.out": 1, "ffn.in": 3, "attention.value": 1}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_peft_merges_to_the_bits_of_the_merged_model(tmp_path, kind):
    base, model = tuned(kind, targets=ROLES)
    save_shira(model, tmp_path / "shira")
    assert_peft_gives(base, model, tmp_path / "shira")
    text = (tmp_path / "shira" / "README.md").read_text()
    assert "SHiRA" in text and "library_name: peft" in text and "lora" not in text.lower()


def test_peft_saves_and_loads_it_again(tmp_path):
    base, model = tuned("llama", targets=ROLES)
    save_shira(model, tmp_path / "ours")
    PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_numbers_are_the_delta(rows, columns, data):
    """Each position once, ascending, and where the slice is not, zeros."""
    dim, random = data.draw(st.integers(0, 1)), torch.Generator().manual_seed(rows * 10 + columns)
    size = (rows, columns)[dim]
    n = data.draw(st.integers(1, size))
    indices, shape = torch.randperm(size, generator=random)[:n].sort().values, [rows, columns]
    shape[dim] = n
    s = s2ft.Slice("layer.weight", dim, indices, (rows, columns), (), torch.randn(shape, generator=random))
    count = data.draw(st.integers(s.delta.numel(), rows * columns))
    values, where = numbers(s, count)
    assert where.dtype == torch.int32 and where.shape == (2, count) and values.dtype == torch.float32
    flat = where[0].long() * columns + where[1]
    assert (flat.diff() > 0).all() and where.min() >= 0 and (where[0] < rows).all() and (where[1] < columns).all()
    expected = torch.zeros(rows, columns).index_copy_(dim, indices, s.delta)
    assert torch.equal(torch.zeros(rows * columns).index_copy_(0, flat, values).view(rows, columns), expected)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
def test_the_smallest_r_that_holds_every_slice_or_an_error_that_names_the_layer(drawn):
    layers = {}
    for i, (rows, columns, n) in enumerate(drawn):
        n = min(n, columns)
        layers[f"l{i}"] = s2ft.Slice(f"l{i}.weight", 1, torch.arange(n), (rows, columns), (), torch.ones(rows, n))
    fits = [
        r
        for r in range(1, 41)
        if all(s.delta.numel() <= r * sum(s.shape) <= s.shape[0] * s.shape[1] for s in layers.values())
    ]
    if fits:
        assert common_r(layers) == fits[0]
        return
    with pytest.raises(ExportError) as caught:
        common_r(layers)
    widest, changes, r, layer, rows, columns, most = re.search(
        r"(l\d) changes ([\d,]+) and needs r = (\d+), but (l\d) \((\d+) x (\d+)\) has room for r = (\d+)",
        str(caught.value),
    ).groups()
    assert int(changes.replace(",", "")) == layers[widest].delta.numel() and int(r) > int(most)
    assert layers[layer].shape == (int(rows), int(columns))
    assert int(most) * (int(rows) + int(columns)) <= int(rows) * int(columns)


def test_a_saved_adapter_becomes_the_shira_of_the_model_that_trained_it(tmp_path):
    base, model = tuned("llama", targets=ROLES)
    save_adapter(model, tmp_path / "adapter")
    save_shira(model, tmp_path / "direct")
    save_shira(base, tmp_path / "converted", adapter=tmp_path / "adapter")
    direct, converted = (load_file(tmp_path / n / WEIGHTS) for n in ("direct", "converted"))
    assert direct.keys() == converted.keys() and all(torch.equal(direct[n], converted[n]) for n in direct)
    config = json.loads((tmp_path / "direct" / CONFIG).read_text())
    values = {n: t for n, t in direct.items() if n.endswith("_weight")}
    assert config["peft_type"] == "SHIRA" and all(
        t.numel()
        == config["r"]
        * sum(base.get_parameter(n.removeprefix("base_model.model.").replace("shira_weight", "weight")).shape)
        for n, t in values.items()
    )


@pytest.mark.parametrize(
    "kind, targets, match",
    [
        (
            "llama",
            {"ffn.out": 1.0},
            r"down_proj changes 384 and needs r = 10, but .*down_proj \(16 x 24\) has room for r = 9",
        ),
        (
            "llama",
            {"ffn.out": 0.9, "attention.value": 1},
            r"down_proj .*needs r = 9, but .*v_proj \(8 x 16\) .* r = 5 at most",
        ),
        ("gpt2", {"ffn.out": 2}, "c_proj is a Conv1D; PEFT's SHiRA takes nn.Linear only"),
    ],
)
def test_what_has_no_room_is_refused(tmp_path, kind, targets, match):
    _, model = tuned(kind, targets=targets)
    with pytest.raises(ExportError, match=match):
        save_shira(model, tmp_path / "shira")
    assert not list(tmp_path.iterdir())
