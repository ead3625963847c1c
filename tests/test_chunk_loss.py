"""`options={"logits": False}`: the same loss and gradients, no full logits, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from small import INNER, NOISE64, QUICK, assert_gradients, compiled, full_gradients, hf, tokens
from torch import nn
from torch._dynamo.utils import counters

import s2ft_compile as s2ft
from s2ft_compile.cli.data import load_model
from s2ft_compile.passes.backward import chunk_loss as chunk_loss_pass

VOCABULARY, WIDTH = 11, 6
CHAINS = {  # between head and loss: name -> logits -> logits
    "cast": lambda x: x.to(torch.float32).double(),  # a cast back is no step: this one stays whole
    "float": lambda x: x.float(),
    "scaled": lambda x: x / 4.0 * 2,
    "capped": lambda x: torch.tanh(x / 3.0) * 3.0,
    "shifted": lambda x: x[..., :-1, :].contiguous(),
    "last": lambda x: x[:, -3:],
}


class Model(nn.Module):
    """An FFN, a head, a chain of steps, and the loss in the forward, as Hugging Face's models have it."""

    def __init__(self, chain=(), bias=False, late=None, added: torch.Tensor | None = None, **loss):
        super().__init__()
        self.added = added if added is None else nn.Buffer(added)
        self.entry = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)) for _ in "12")
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.chain, self.late, self.loss = chain, late, loss
        self.double()

    def forward(self, x, labels=None):
        h = self.entry(x)
        for layer in self.layers:
            h = h + layer(h)
        logits = self.head(h)
        if self.added is not None:  # as BART does
            logits = logits + self.added.to(h.device)
        if labels is None:
            return {"logits": logits}
        scores = logits
        for step in self.chain:
            scores = CHAINS[step](scores)
        labels = labels[:, -scores.shape[1] :]
        loss = F.cross_entropy(scores.reshape(-1, VOCABULARY), labels.reshape(-1), **self.loss)
        return {"loss": loss if self.late is None else loss + self.late(logits), "logits": logits}


def example(rows: int, length: int, ignored: int = 0):
    labels = torch.randint(VOCABULARY, (rows, length))
    labels[0, :ignored] = -100
    return {"x": torch.randn(rows, length, 4, dtype=torch.float64), "labels": labels}


def check(model: Model, inputs: dict, inner: str = "aot_eager", tolerance: float = NOISE64) -> bool:
    """The loss and gradients are the eager base model's; returns whether the logits were dropped."""
    full = full_gradients(model, lambda m: m(**inputs)["loss"])
    expected = model(**inputs)["loss"].detach()
    plan = s2ft.prepare(model, {"x": inputs["x"]}, s2ft.S2FTConfig({"ffn.out": 0.5}))
    output = compiled(model, inner, logits=False)(**inputs)
    output["loss"].backward()
    torch.testing.assert_close(output["loss"].detach(), expected, rtol=tolerance, atol=0)
    assert_gradients(plan, full, tolerance)
    return output["logits"] is None


@settings(max_examples=15, phases=QUICK)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    length=st.integers(4, 9),
    size=st.integers(1, 12),
    bias=st.booleans(),
    chain=st.lists(st.sampled_from(["scaled", "capped", "shifted", "last"]), max_size=3),
    added=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    inner=st.sampled_from(INNER),
)
def test_loss_and_gradients_do_not_change(data, rows, length, size, bias, chain, added, reduction, inner):
    torch._dynamo.reset()
    chunk_loss_pass.TOKENS, kept = size, chunk_loss_pass.TOKENS
    try:
        inputs = example(rows, length, data.draw(st.integers(0, length - 3)))
        more = torch.randn(1, VOCABULARY) if added else None
        assert check(Model(chain, bias, added=more, reduction=reduction), inputs, inner)
    finally:
        chunk_loss_pass.TOKENS = kept


def test_a_cast_to_float32_and_inductor(monkeypatch):
    """The loss is a float32 sum of 24 tokens, each of logits that float32 rounds: both to a few of its units."""
    monkeypatch.setattr(chunk_loss_pass, "TOKENS", 5)
    assert check(Model(("float",)), example(3, 8, 2), "inductor", tolerance=64 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_add_up_tokens(dtype):
    """6007 losses of 12 or more are over float16's largest number; and a mean's gradient is rounded once, where
    1 / 6007 in bfloat16 would put the same error of up to 2^-9 on every entry."""
    h, W = torch.randn(6007, WIDTH).to(dtype), (24 * torch.randn(VOCABULARY, WIDTH)).to(dtype)
    labels, grads, losses = torch.randint(VOCABULARY, (6007,)), {}, {}
    for mean in (True, False):
        leaf = h.clone().requires_grad_()
        losses[mean] = chunk_loss_pass.chunked_cross_entropy(leaf, W, None, labels, -100, mean, [], [], 20)
        (grads[mean],) = torch.autograd.grad(losses[mean], leaf)
    unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    exact = F.cross_entropy(F.linear(h.double(), W.double()), labels)
    assert exact > 12 and abs(losses[True].double() - exact) <= 4 * unit * exact  # of the logits, the sums, the mean
    error = (grads[True].double() - grads[False].double() / 6007).abs()
    assert (error <= (1 + 2.0**-10) * unit * grads[False].double().abs() / 6007 + unit * tiny).all()


@pytest.mark.parametrize(
    "model",
    [
        Model(label_smoothing=0.1),
        Model(weight=torch.ones(VOCABULARY).double()),
        Model(("cast",)),
        Model(added=torch.randn(5, VOCABULARY)),
        Model(late=lambda logits: logits.square().mean()),
        Model(late=lambda logits: logits[..., :5].sum() * 0.01),
    ],
    ids=[
        "smoothing",
        "weights",
        "a cast that is no step",
        "other logits for each token",
        "read by another loss",
        "a part is read",
    ],
)
def test_what_does_not_match_stays_whole(model):
    assert not check(model, example(2, 5), tolerance=1e-6 if model.chain else NOISE64)


def test_a_head_that_trains_keeps_its_logits():
    model, inputs = Model(), example(2, 5)
    full = full_gradients(model, lambda m: m(**inputs)["loss"])
    plan = s2ft.prepare(model, {"x": inputs["x"]}, s2ft.S2FTConfig({"head.weight": 2, "ffn.out": 0.5}))
    output = compiled(model, logits=False)(**inputs)
    output["loss"].backward()
    assert output["logits"].shape == (2, 5, VOCABULARY)
    assert_gradients(plan, full, NOISE64)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_hugging_face_models(family):
    model, ids = hf(family).double(), tokens(length=12)
    full = full_gradients(model, lambda m: m(input_ids=ids, labels=ids).loss)
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig({"ffn.out": 3}))
    net = compiled(model, logits=False)
    output = net(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits is None
    assert_gradients(plan, full, 1e-5)  # these models compute their norms in float32
    with torch.no_grad():
        assert net(input_ids=ids, labels=ids).logits.shape == (2, 12, 50)  # nothing is hidden from an evaluation


def test_a_loss_that_warns_is_in_the_graph_of_a_loaded_model(tmp_path):
    """transformers knows no loss by GPT-2's name, and says so where it looks it up."""
    hf("gpt2").save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), tokens(length=12)
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig({"ffn.out": 3}))
    assert compiled(model, logits=False)(input_ids=ids, labels=ids).logits is None


@pytest.mark.parametrize("logits, rows", [(True, 60), (False, 10)])
def test_no_tensor_holds_all_logits(monkeypatch, logits, rows):
    """The most rows of any tensor as wide as the vocabulary in the graphs of a step."""
    graphs = []
    monkeypatch.setattr(s2ft.backend, "boxed", lambda gm, inputs: graphs.append(gm) or make_boxed_func(gm.forward))
    monkeypatch.setattr(chunk_loss_pass, "TOKENS", 10)
    model, inputs = Model(), example(3, 20)
    s2ft.prepare(model, {"x": inputs["x"]}, s2ft.S2FTConfig({"ffn.out": 0.5}))
    compiled(model, logits=logits)(**inputs)["loss"].backward()
    values = [n.meta["val"] for gm in graphs for n in gm.graph.nodes if n.op == "call_function"]
    wide = [t.numel() // VOCABULARY for t in values if isinstance(t, torch.Tensor) and t.shape[-1:] == (VOCABULARY,)]
    assert len(graphs) == 2 and max(wide) == rows


def test_other_lengths_compile_once_more():
    model = Model(("shifted",))
    s2ft.prepare(model, {"x": example(2, 5)["x"]}, s2ft.S2FTConfig({"ffn.out": 0.5}))
    net = compiled(model, logits=False)
    for length in (5, 7, 9, 30):
        inputs = example(2, length)
        net(**inputs)["loss"].backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


class Converted(nn.Module):
    """What mixed precision wrappers do: the outputs are cast before they are returned."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        return {name: value.float() for name, value in self.model(x, labels).items()}


def test_logits_that_are_cast_and_returned_are_dropped():
    assert check_dropped(Converted(Model()), example(2, 5))


def check_dropped(model: nn.Module, inputs: dict) -> bool:
    s2ft.prepare(model, inputs, s2ft.S2FTConfig({"ffn.out": 0.5}))
    output = compiled(model, logits=False)(**inputs)
    output["loss"].backward()
    return output["logits"] is None


def test_much_longer_inputs_have_more_chunks(monkeypatch, caplog):
    """The graph for any length is made for the second one; chunks of a fixed number would grow with the third."""
    monkeypatch.setattr(chunk_loss_pass, "TOKENS", 8)
    model = Model()
    s2ft.prepare(model, {"x": example(2, 5)["x"]}, s2ft.S2FTConfig({"ffn.out": 0.5}))
    net = compiled(model, logits=False)
    with caplog.at_level("INFO", chunk_loss_pass.log.name):
        for length in (4, 5, 16, 17, 30, 9):  # 2 chunks of up to 16 serve 32 tokens
            net(**example(2, length))["loss"].backward()
    assert [r.args[1:] for r in caplog.records if r.name == chunk_loss_pass.log.name] == [(8, 1), (10, 2), (34, 5)]


def test_an_option_that_changes_nothing_says_so(caplog):
    model, inputs = Model(), example(2, 5)
    s2ft.prepare(model, {"x": inputs["x"]}, s2ft.S2FTConfig({"ffn.out": 0.5}))
    compiled(model, logits=False)(inputs["x"])["logits"].sum().backward()
    assert "no cross-entropy" in caplog.text
