"""Calibrated scores against plain hooks and full gradients in float64, on every way a weight can be used; memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from small import QUICK, assert_unchanged, cases, compiled, drawn, hf, snapshot, tokens
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import s2ft_compile as s2ft
from s2ft_compile.config import CALIBRATED
from s2ft_compile.errors import ConfigError
from s2ft_compile.passes.select.calibrate import calibrate
from s2ft_compile.passes.select.scores import squares
from s2ft_compile.passes.select.selections import SCORES
from s2ft_compile.slices.state import state_of
from s2ft_compile.testing import Promoted

CLOSE = dict(rtol=1e-9, atol=1e-12)  # sums of at most some thousand squares in float64


def places_of(model):
    """Both dimensions of every matrix that a module with `made` and `read` dimensions holds."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {m: names[id(m.weight)] for m in model.modules() if is_projection(m)}


def is_projection(module):
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2


def dims_of(module):
    """(made, read) dimensions of a projection's weight."""
    return (0, 1) if isinstance(module, nn.Linear) else (1, 0)


def oracle(model, batches, call):
    """selection -> (name, dim) -> scores, by forward hooks on the modules that hold the weights; uses add up."""
    scores = {"activation": {}, "weight_activation": {}}

    def add(selection, place, values):
        scores[selection][place] = scores[selection].get(place, 0) + values

    def hook(module, args, kwargs, output):
        name, (_, read) = places[module], dims_of(module)
        W, y = module.weight.detach().double(), output.double()
        if isinstance(module, nn.Embedding):
            x = F.one_hot(args[0], W.shape[0]).double()
        else:
            x = args[0].double()
            y = y if module.bias is None else y - module.bias.double()
        x, y = (t.reshape(-1, t.shape[-1]) for t in (x, y))
        entries = W.square() * (x.square().sum(0)[:, None] if read == 0 else x.square().sum(0))
        for dim in (0, 1):
            add("activation", (name, dim), (x if dim == read else y).square().sum(0))
            add("weight_activation", (name, dim), entries.sum(1 - dim))

    places = places_of(model)
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in places]
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for handle in handles:
        handle.remove()
    return scores


def gradients(model, batches, loss):
    """(name, dim) -> scores: the squares of every batch's full gradients."""
    squares = {}
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), list(model.parameters()), allow_unused=True)
        for (name, p), g in zip(model.named_parameters(), gradients):
            g = torch.zeros_like(p) if g is None else g
            for dim in range(p.ndim):
                others = [d for d in range(p.ndim) if d != dim]
                total = g.double().square().sum(others) if others else g.double().square()
                squares[name, dim] = squares.get((name, dim), 0) + total
    return squares


def assert_close(products, expected):
    assert products.keys() == expected.keys() and products
    for place, values in expected.items():
        assert products[place].dtype == torch.float64 and products[place].device.type == "cpu"
        torch.testing.assert_close(products[place], values, msg=lambda m, place=place: f"{place}: {m}", **CLOSE)


def batches_of(case):
    """Three batches of different sizes."""
    (x,) = case.inputs
    return [(x,), (x.flip(0)[:1],), (torch.cat([x, x])[:, :2],)]


def case_loss(output, batch=None):
    outputs = output if isinstance(output, tuple) else (output,)
    return sum(((o - 0.1 * torch.linspace(-1, 1, o.shape[-1], dtype=o.dtype)) ** 2).mean() for o in outputs)


# --- drawn models ----------------------------------------------------------------------------------------------------


@given(cases())
@settings(phases=QUICK)
def test_scores_of_drawn_models_are_those_of_plain_hooks(case):
    """Fused and separate, transposed, gated, tied, biased: all dimensions of all matrices."""
    model, batches = case.make(), batches_of(case)
    before = snapshot(model)
    expected = oracle(model, batches, lambda m, b: m(*b))
    places = list(expected["activation"])
    for selection in ("activation", "weight_activation"):
        assert_close(calibrate(model, places, selection, batches), expected[selection])
    full = gradients(model, batches, lambda m, b: case_loss(m(*b)))
    assert_close(calibrate(model, list(full), "gradient", iter(batches), case_loss), full)
    assert_unchanged(model, before)


@pytest.mark.parametrize("selection", CALIBRATED)
def test_a_tied_weight_adds_its_uses(selection):
    case = drawn(tied=True)
    model, batches = case.make(), [case.inputs]
    scores = calibrate(model, [("embed.weight", 1)], selection, batches, case_loss)
    if selection == "gradient":
        expected = gradients(model, batches, lambda m, b: case_loss(m(*b)))
    else:
        expected = oracle(model, batches, lambda m, b: m(*b))[selection]
    assert_close(scores, {("embed.weight", 1): expected["embed.weight", 1]})


# --- Hugging Face models ---------------------------------------------------------------------------------------------


def hf_batches(name):
    """Batches with labels, of different sizes."""
    batches = [tokens(2, 8, 1), tokens(1, 5, 2), tokens(3, 8, 3)]
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


@pytest.mark.parametrize(
    "name, changes",
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gpt2", {}), ("bert", {})],
    ids=str,
)
def test_scores_of_hugging_face_models(name, changes):
    model, batches = hf(name, **changes).double(), hf_batches(name)
    with Promoted():
        expected = oracle(model, batches, lambda m, b: m(**b))
        for selection in ("activation", "weight_activation"):
            assert_close(calibrate(model, list(expected[selection]), selection, batches), expected[selection])
        full = gradients(model, batches, lambda m, b: m(**b).loss)
        assert_close(calibrate(model, list(full), "gradient", batches), full)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("selection", CALIBRATED)
def test_prepare_selects_the_units_with_the_best_scores(selection, largest):
    model, batches = hf("llama"), hf_batches("llama")
    targets = {"attention.out": 2, "ffn.in": 5, "ffn.out": 5, "attention.value": 1}
    if selection == "gradient":
        scores = gradients(model, batches, lambda m, b: m(**b).loss)
    else:
        scores = oracle(model, batches, lambda m, b: m(**b))[selection]
    config = s2ft.S2FTConfig(targets=targets, selection=selection, largest=largest)
    plan = s2ft.prepare(model, {"input_ids": tokens()}, config, calibration=batches)
    assert len(plan.slices) == 10
    for s in plan.slices:
        layer = s.parameter_name.rpartition("self_attn")[0] or s.parameter_name.rpartition("mlp")[0]
        at = {
            n: (f"{layer}{'mlp' if n in ('gate', 'up', 'down') else 'self_attn'}.{n}_proj.weight", d)
            for n, d in (("gate", 0), ("up", 0), ("down", 1), ("v", 0), ("o", 1))
        }
        part = s.parameter_name.split(".")[-2].removesuffix("_proj")
        shared, width = (("gate", "up", "down"), 1) if part in ("gate", "up", "down") else ((part,), 4)
        units = sum(scores[at[n]] for n in shared).view(-1, width).sum(1)
        best = units.argsort(descending=largest)[: len(s.indices) // width]
        expected = (best[:, None] * width + torch.arange(width)).flatten().sort().values
        assert s.indices.sort().values.tolist() == expected.tolist(), s.parameter_name


# --- other products --------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Weights used without a module of their own: fused and sliced, batched experts, one by one, convolutions."""

    def __init__(self):
        super().__init__()
        for name, shape in {
            "fused": (14, 6),
            "experts": (3, 6, 5),
            "back": (3, 5, 6),
            "each": (3, 4, 6),
            "flat": (15, 6),
            "vector": (6, 6),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.conv, self.depth = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 4, 3, stride=2, groups=2)

    def forward(self, x):
        gate, up = self.fused.chunk(2)
        h = F.linear(x, gate) * (x @ up.T)
        e = torch.einsum("bsi,eio->ebso", x, self.experts)
        e = torch.bmm(e.flatten(1, 2), self.back)
        each = sum(F.linear(x, self.each[i]).sum() for i in (0, 2))
        flat = torch.einsum("bsi,eoi->bseo", x, self.flat.view(3, 5, 6))
        c = self.depth(self.conv(x.transpose(1, 2)))
        return h.sum() + e.sum() + each + flat.sin().sum() + c.sum() + (self.vector @ x[0, 0]).sum()


def functional_oracle(m, x):
    """(name, dim) -> the activation, (name) -> the squared input norm of every entry."""
    s = x.double().reshape(-1, 6)
    n = s.square().sum(0)
    A, N = {}, {}
    A["fused", 0], N["fused"] = (s @ m.fused.T).square().sum(0), n.expand(14, 6)
    e = torch.einsum("ti,eio->eto", s, m.experts)
    A["experts", 2], N["experts"] = e.square().sum((0, 1)), n[:, None].expand(3, 6, 5)
    A["back", 1], N["back"] = e.square().sum((0, 1)), e.square().sum(1)[..., None].expand(3, 5, 6)
    each = torch.einsum("ti,eoi->eto", s, m.each)[[0, 2]]
    used = torch.tensor([1.0, 0.0, 1.0]).double()[:, None, None]
    A["each", 1], N["each"] = each.square().sum((0, 1)), used * n.expand(3, 4, 6)
    A["flat", 0], N["flat"] = (s @ m.flat.T).square().sum(0), n.expand(15, 6)
    A["vector", 1], N["vector"] = x[0, 0].square(), x[0, 0].square().expand(6, 6)
    t = x.transpose(1, 2)
    c = m.conv(t)
    padded = F.pad(t, (1, 1)).square()
    A["conv.weight", 0] = (c - m.conv.bias[:, None]).square().sum((0, 2))
    N["conv.weight"] = torch.stack([padded[..., k : k + t.shape[-1]].sum((0, 2)) for k in range(3)], -1).expand(8, 6, 3)
    d = m.depth(c)
    A["depth.weight", 0] = (d - m.depth.bias[:, None]).square().sum((0, 2))
    taps = torch.stack([c.square()[..., k : k + 2 * d.shape[-1] - 1 : 2].sum((0, 2)) for k in range(3)], -1)
    N["depth.weight"] = taps.view(2, 1, 4, 3).expand(2, 2, 4, 3).reshape(4, 4, 3)
    return A, N


def test_products_of_weights_without_a_module():
    torch.manual_seed(3)
    model, x = Functional().double(), torch.randn(2, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        A, N = functional_oracle(model, x)
    assert_close(calibrate(model, list(A), "activation", [(x,)]), A)
    S = {
        (name, dim): (model.get_parameter(name).detach().square() * N[name]).movedim(dim, 0).flatten(1).sum(1)
        for name, dim in A
    }
    assert_close(calibrate(model, list(A), "weight_activation", [(x,)]), S)
    full = gradients(model, [x], lambda m, b: m(b))
    assert_close(calibrate(model, list(full), "gradient", [(x,)]), full)


def test_grouped_products_of_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 8).bfloat16())

        def forward(self, x, ends):
            return torch._grouped_mm(x, self.up.transpose(1, 2), offs=ends)

    model, x, ends = Experts(), torch.randn(9, 8).bfloat16(), torch.tensor([4, 4, 9], dtype=torch.int32)
    groups = [x[0:4], x[4:4], x[4:9]]
    outputs = [(g @ W.T).double() for g, W in zip(groups, model.up.detach())]
    scores = calibrate(model, [("up", 1)], "activation", [(x, ends)])
    expected = sum(y.square().sum(0) for y in outputs)
    torch.testing.assert_close(scores["up", 1], expected, rtol=2**-6, atol=0.0)  # bf16 outputs of two kernels
    entries = sum(W.double().square() * g.double().square().sum(0) for g, W in zip(groups, model.up.detach()))
    scores = calibrate(model, [("up", 1)], "weight_activation", [(x, ends)])
    assert_close(scores, {("up", 1): entries.sum(1)})


def test_a_transformer_encoder_layer_is_seen_in_its_parts():
    """In eval mode torch has one operator for the whole layer, which would hide its products."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    scores = calibrate(layer, [("linear2.weight", 1), ("self_attn.in_proj_weight", 0)], "activation", [(x,)])
    assert torch.backends.mha.get_fastpath_enabled(), "put back"
    with torch.no_grad():
        q = (x @ layer.self_attn.in_proj_weight.T).square().sum((0, 1))
        h = layer.norm1(x + layer.self_attn(x, x, x)[0])
        h = F.relu(layer.linear1(h)).square().sum((0, 1))
    assert_close(scores, {("linear2.weight", 1): h, ("self_attn.in_proj_weight", 0): q})


def test_the_memory_of_a_copy_that_is_gone_is_not_taken_for_it():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            y = 0
            for _ in range(20):
                y = y + F.linear(x, self.weight.clone())
                y = y + F.linear(x, torch.zeros(4, 3) * 2.0 + 1.0)  # in memory that the copy has left
            return y

    model, x = Copies(), torch.randn(2, 3)
    scores = calibrate(model, [("weight", 1)], "activation", [(x,)])
    assert_close(scores, {("weight", 1): 20 * x.double().square().sum(0)})


def test_a_use_that_is_no_product_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return F.linear(x, self.weight * 2.0)

    model, x = Scaled(), torch.randn(2, 3)
    for selection in ("activation", "weight_activation"):
        with pytest.raises(ConfigError, match="of weight cannot be told: it goes into aten.mul.*'gradient'"):
            calibrate(model, [("weight", 1)], selection, [(x,)])
    full = gradients(model, [x], lambda m, b: m(b).sum())
    assert_close(calibrate(model, list(full), "gradient", [(x,)], lambda y, b: y.sum()), full)


# --- what is asked of the user ---------------------------------------------------------------------------------------

CONFIGS = {s: s2ft.S2FTConfig(targets={"ffn.out": 2}, selection=s) for s in CALIBRATED}


def one_layer():
    return hf("llama", num_hidden_layers=1)


def test_without_data_the_error_says_what_to_pass():
    model = one_layer()
    before = snapshot(model)
    for selection, config in CONFIGS.items():
        for bad, message in (
            (None, f"'{selection}' looks at data: pass calibration=.* without data use 'random'"),
            ({"input_ids": tokens()}, r"got one dict; for one batch pass \[batch\]"),
            (tokens(), "got one Tensor"),
            (7, "got one int"),
        ):
            with pytest.raises(ConfigError, match=message):
                s2ft.prepare(model, {"input_ids": tokens()}, config, calibration=bad)
        for bad, message in (([], "no batches"), (["text"], "a tuple or a dict")):
            with pytest.raises(ConfigError, match=message):
                calibrate(model, [], selection, bad)
    with pytest.raises(ConfigError, match="no batches"):
        s2ft.prepare(model, {"input_ids": tokens()}, CONFIGS["activation"], calibration=iter(()))
    assert_unchanged(model, before)


def test_without_a_loss_the_error_says_what_to_pass():
    model, batches = one_layer(), [{"input_ids": tokens()}]
    before = snapshot(model)
    places = [("model.layers.0.mlp.down_proj.weight", 1)]
    for loss, message in (
        (None, "LlamaForCausalLM returned NoneType; give the batches labels .* or pass loss="),
        (lambda out, batch: out.logits, r"loss= returned a tensor of shape \(2, 8, 50\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(model, places, "gradient", batches, loss)
    assert_unchanged(model, before)


def test_a_loss_of_output_and_batch_is_the_models_own():
    ids = [tokens(2, 8, s) for s in (0, 1)]
    own = s2ft.prepare(
        one_layer(),
        {"input_ids": ids[0]},
        CONFIGS["gradient"],
        calibration=[{"input_ids": i, "labels": i} for i in ids],
    )

    def next_token(output, batch):
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    given = s2ft.prepare(
        one_layer(),
        {"input_ids": ids[0]},
        CONFIGS["gradient"],
        calibration=[{"input_ids": i} for i in ids],
        loss=next_token,
    )
    assert [s.indices.tolist() for s in own.slices] == [s.indices.tolist() for s in given.slices]


def test_values_that_are_not_finite_are_refused():
    model = hf("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    for selection in CALIBRATED:
        with pytest.raises(ConfigError, match="values that are not finite at model.layers"):
            calibrate(model, [("model.layers.0.mlp.down_proj.weight", 1)], selection, hf_batches("llama"))


def test_a_bias_ranks_with_its_weight_and_not_alone():
    (model, other), batches = (hf("qwen2", num_hidden_layers=1) for _ in range(2)), hf_batches("qwen2")
    name = "model.layers.0.self_attn.v_proj"
    both = s2ft.S2FTConfig(targets={f"{name}.*": 1}, selection="activation")
    plan = s2ft.prepare(model, {"input_ids": tokens()}, both, calibration=batches)
    assert len({tuple(s.indices.tolist()) for s in plan.slices}) == 1 and len(plan.slices) == 2
    alone = s2ft.S2FTConfig(targets={f"{name}.bias": 1}, selection="activation")
    with pytest.raises(ConfigError, match="no scores for .*v_proj.bias: a bias or a norm has no activations"):
        s2ft.prepare(other, {"input_ids": tokens()}, alone, calibration=batches)


@pytest.mark.parametrize("selection, in_place", [("weight_activation", False), ("gradient", True)])
def test_a_model_prepared_at_its_first_call_is_calibrated_on_that_call(selection, in_place):
    ids = tokens()
    expected = s2ft.prepare(
        one_layer(), {"input_ids": ids}, CONFIGS[selection], calibration=[{"input_ids": ids, "labels": ids}]
    )
    base = one_layer()
    options = {"inner": "aot_eager", "targets": {"ffn.out": 2}, "selection": selection}
    if in_place:
        base.compile(backend="s2ft", options=options)
        base(input_ids=ids, labels=ids).loss.backward()
    else:
        compiled(base, **options)(input_ids=ids, labels=ids).loss.backward()
    plan = state_of(base).plan
    assert [s.indices.tolist() for s in plan.slices] == [s.indices.tolist() for s in expected.slices]


def test_a_compiled_model_is_calibrated_uncompiled():
    model = hf("llama")
    model.compile(backend="s2ft", options={"inner": "aot_eager", "targets": {"ffn.out": 2}})
    for selection in CALIBRATED:
        calibrate(model, [("model.layers.0.mlp.down_proj.weight", 1)], selection, hf_batches("llama"))
    assert not s2ft.is_prepared(model) and not torch._dynamo.utils.counters["frames"]


# --- memory ----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all memory that operators made and that is still alive, and the most there ever were."""

    def __init__(self, model):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_no_two_gradients_are_alive_at_once(monkeypatch):
    """But for a tied weight's, of which the first part waits for the last."""
    model, refs, alive = one_layer(), [], []

    def watched(x, dim):
        alive.append(sum(not ref.expired() for ref in refs))
        refs.append(StorageWeakRef(x.untyped_storage()))
        return squares(x, dim)

    monkeypatch.setitem(SCORES, "gradient", watched)
    places = [(n, 0) for n, p in model.named_parameters() if p.ndim == 2]
    calibrate(model, places, "gradient", hf_batches("llama"))
    assert len(alive) == 3 * len(places) and max(alive) == 0


LINEAR = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calibration_takes_no_more_memory_than_a_forward_or_a_forward_and_dx(dtype):
    """All linear layers at once. The weights themselves are not counted."""
    model = hf("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=3, vocab_size=64).to(dtype)
    ids = torch.randint(0, 64, (2, 512))
    places = [(n, d) for n, _ in model.named_parameters() for part, d in LINEAR.items() if part in n]
    peaks = {}
    for selection in CALIBRATED:
        with Live(model) as live:
            calibrate(model, places, selection, [{"input_ids": ids, "labels": ids}])
        peaks[selection] = live.peak
    with torch.no_grad(), Live(model) as forward:
        model(input_ids=ids, labels=ids)
    model.requires_grad_(False)
    x = model.get_input_embeddings()(ids).requires_grad_()
    with Live(model) as both:
        loss = model(inputs_embeds=x, labels=ids).loss
        torch.autograd.grad(loss, x)
    assert peaks["activation"] <= 1.05 * forward.peak
    assert peaks["weight_activation"] <= 1.05 * forward.peak
    assert peaks["gradient"] <= 1.05 * both.peak
