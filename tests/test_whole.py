"""A target of 1.0 by name trains all of what it matches, whatever its axes are: heads, norms, biases, embeddings."""

import copy
from fnmatch import fnmatch

import pytest
import torch
from small import BERT, LLAMA, assert_weights, hf, tokens, tuned
from test_trainable import Accumulated, X
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile import exporters
from s2ft_compile.errors import ConfigError, ExportError
from s2ft_compile.testing import assert_gradients


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_everything_is_full_fine_tuning(family):
    """Tied embeddings and a head, fused projections, norms and biases: the gradient of each is all of float64's. A
    softmax does not see a key's bias, whose gradient is rounding alone."""
    model, inputs = hf(family), {"input_ids": tokens()}
    targets = {"*weight": 1.0, "*LayerNorm.bias": 1.0, "*value.bias": 1.0} if family == "bert" else {"*": 1.0}
    plan = s2ft.prepare(model, inputs, s2ft.S2FTConfig(targets))
    names = {n for n, _ in hf(family).named_parameters()}
    assert {s.parameter_name for s in plan.slices} == {n for n in names if any(fnmatch(n, t) for t in targets)}
    assert all(len(s.indices) == s.shape[0] for s in plan.slices)
    assert_gradients(model, plan, inputs, loss=lambda output: output.logits.sin().sum())


def test_a_weight_whose_gradient_has_no_slice_rule_trains_as_a_whole():
    model = Accumulated()
    plan = s2ft.prepare(model, (X,), s2ft.S2FTConfig({"u": 1.0, "ffn.in": 3}))
    assert {s.parameter_name: len(s.indices) for s in plan.slices} == {"u": 16, "l.weight": 3}
    assert_gradients(model, plan, (X,), loss=lambda output: output.sin().sum())


def classifier(kind: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if kind == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3))
    else:
        model = t.LlamaForSequenceClassification(t.LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0))
    return model.eval()


@pytest.mark.parametrize("selection", ["random", "gradient"])
@pytest.mark.parametrize("kind, head", [("bert", "classifier.*"), ("llama", "score.weight")])
def test_a_new_head_trains_with_the_slices_and_is_in_the_adapter(kind, head, selection, tmp_path):
    base = classifier(kind)
    model, batch = copy.deepcopy(base), {"input_ids": tokens(4) + 1 - (tokens(4) > 48).long()}
    batch["labels"] = torch.tensor([0, 1, 2, 0])
    config = s2ft.S2FTConfig({"ffn.in": 3, "ffn.out": 3, head: 1.0}, selection=selection, top_layers=1)
    plan = s2ft.prepare(model, batch, config, calibration=[batch] if selection == "gradient" else None)
    optimizer = s2ft.optimizer(model, lr=0.1)
    net = torch.compile(model, backend="s2ft", options={"inner": "aot_eager"})
    for _ in range(2):
        net(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exporters.save_adapter(model, tmp_path / "adapter")
    expected = tuned(base, plan)
    moved = {n for n, p in base.named_parameters() if not torch.equal(p, expected[n])}
    assert {n.split(".")[0] for n in moved} == {"model" if kind == "llama" else "bert", head.split(".")[0]}
    loaded = copy.deepcopy(base)
    exporters.load_adapter(loaded, tmp_path / "adapter")
    assert_weights(loaded, expected)


def test_what_trains_besides_is_not_lost_by_an_adapter(tmp_path):
    """Its own optimizer is one of the prepared model, and what it trains is not in the slices."""
    model = classifier("bert")
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig({"ffn.out": 2}))
    frozen = torch.optim.SGD([model.classifier.weight], lr=0.1)
    model(tokens()).logits.sum().backward()
    with pytest.raises(s2ft.StateError, match="made before the model was prepared"):
        frozen.step()
    model.classifier.weight.requires_grad_(True)
    model(tokens()).logits.sum().backward()
    frozen.step()
    for write in (exporters.save_adapter, exporters.save_lora):
        with pytest.raises(
            ExportError, match="classifier.weight .1 in all. train besides the slices.*'classifier.weight': 1.0"
        ):
            write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    exporters.save_merged(model, tmp_path / "merged")


def test_a_part_of_what_has_no_free_axis_is_refused_and_says_how_all_of_it_trains():
    with pytest.raises(ConfigError, match="no axis that may be permuted.*'classifier.bias': 1.0} trains all of it"):
        s2ft.prepare(classifier("bert"), {"input_ids": tokens()}, s2ft.S2FTConfig({"classifier.bias": 0.5}))
