"""A slice is right wherever its weight is read: every way of running a prepared model, against float64 full gradients
of the base model; and every way of changing a delta or a weight is seen, or refused."""

import copy
import io
import threading
import warnings
from functools import cache

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import torch.nn.utils.prune
from small import (
    LLAMA,
    NOISE64,
    U32,
    assert_gradients,
    assert_unchanged,
    compiled,
    drawn,
    full_gradients,
    hf,
    prepared,
    same_bits,
    snapshot,
    tokens,
)
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import s2ft_compile as s2ft
import s2ft_compile.layers
from s2ft_compile.errors import ConfigError, StateError
from s2ft_compile.passes.backward import eager
from s2ft_compile.slices.blocks import blocks_in
from s2ft_compile.slices.state import merged, state_of

TARGETS = {"ffn.out": 5, "ffn.in": 3, "attention.out": 1}
DEPTH = 3


@pytest.fixture(autouse=True)
def no_warning_yet():
    eager._warned.clear()


def llama(**changes):
    """(base in float64, the same prepared, its plan): a Hugging Face model of three layers."""
    return copy.deepcopy(_llama(**changes))


@cache
def _llama(**changes):
    base = hf("llama", num_hidden_layers=DEPTH, **changes).double()
    model = copy.deepcopy(base)
    plan = s2ft.prepare(model, (tokens(),), s2ft.S2FTConfig(targets=TARGETS))
    return base, model.train(), plan


def loss(model):
    return model(input_ids=tokens(), labels=tokens()).loss


def check(base, plan, of=loss, tolerance=32 * U32):  # Hugging Face's norms and rotations are float32 inside
    assert_gradients(plan, full_gradients(base.train(), of), tolerance)


def by_layer(model):
    assert s2ft.compile_layers(model, inner="aot_eager") == list(model.model.layers)
    return model


def whole(model):
    model.compile(backend="s2ft", options={"inner": "aot_eager"})
    return model


def checkpointed(reentrant):
    def enable(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return enable


def forced_eager(model):
    with torch.compiler.set_stance("force_eager"):
        loss(whole(model)).backward()


WAYS = {
    "whole": whole,
    "by layer": by_layer,
    "eager": lambda model: model,
    "checkpointed, whole": lambda model: whole(checkpointed(False)(model)),
    "checkpointed, by layer": lambda model: by_layer(checkpointed(False)(model)),
    "checkpointed, eager": checkpointed(False),
    "checkpointed reentrant, whole": lambda model: whole(checkpointed(True)(model)),
    "checkpointed reentrant, by layer": lambda model: by_layer(checkpointed(True)(model)),
    "checkpointed reentrant, eager": checkpointed(True),
    "another backend": lambda model: torch.compile(model, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_float64_slices(way, recwarn):
    base, model, plan = llama()
    run = WAYS[way](model)
    for _ in range(2):  # once more, after a step that changed the weights
        s2ft_loss = loss(run)
        s2ft_loss.backward()
        check(base, plan)
        torch.optim.SGD(s2ft.parameters(model), lr=0.1).step()
        with torch.no_grad():
            for s in plan.slices:
                W = base.get_parameter(s.parameter_name)
                W.index_add_(s.dim, s.indices, s.delta.grad.double(), alpha=-0.1)
        model.zero_grad()
    assert not [w for w in recwarn if "full size" in str(w.message)], "no gradient of a frozen weight"


@pytest.mark.parametrize("way", ["whole", "by layer", "eager"])
def test_gradients_of_activations_that_trl_moves_away(way, monkeypatch):
    """TRL's own offloading, which asks for an accelerator: told that the CPU is one, it copies what is saved."""
    from types import SimpleNamespace

    from trl.models.activation_offloading import OffloadActivations

    base, model, plan = llama()
    run = WAYS[way](model)
    with monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cpu"))
        away = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=1)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # called where bitsandbytes is imported
    away.update_model_params(model)
    with away:
        value = loss(run)
        assert any(was_moved for _, was_moved, *_ in away.tracker.values())
        value.backward()
    check(base, plan)


def test_equal_layers_share_one_graph():
    _, model, _ = llama()
    loss(by_layer(model)).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "the lowest layer, and one for all others"


def test_layers_are_found_and_options_checked():
    case, model = prepared()
    assert s2ft.layers.repeated_layers(model) == list(model.blocks)
    assert s2ft.layers.repeated_layers(walk()[0]) == []
    for call, message in (
        (lambda: s2ft.compile_layers(walk()[0]), "Walk has no list of layers of one class"),
        (lambda: s2ft.compile_layers(model, inner="onnx"), "unknown inner backend"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def backward_flops(model) -> int:
    total = loss(model)
    with FlopCounterMode(display=False) as count:
        total.backward()
    return count.get_total_flops()


def frozen_floor(base) -> int:
    """The FLOPs of a backward that has no weight gradient, only that of the embeddings."""
    base.requires_grad_(False)
    base.model.embed_tokens.weight.requires_grad_(True)
    return backward_flops(base)


@pytest.mark.parametrize("way", ["eager", "checkpointed, eager", "by layer", "whole"])
def test_a_backward_computes_slices_and_nothing_of_full_size(way):
    """Counted: a weight's gradient takes as many FLOPs as its slice has rows or columns. Without the floor's dX of the
    lowest layer, which no slice needs in full, it may be less."""
    base, model, plan = llama()
    flops = backward_flops(WAYS[way](model))
    recomputed, count = "checkpointed" in way, tokens().numel()
    floor = frozen_floor(checkpointed(False)(base).train() if recomputed else base.train())
    if recomputed:  # up to the last tensor that is saved: a slice of the last product's input, here
        floor += DEPTH * 2 * count * LLAMA["intermediate_size"] * LLAMA["hidden_size"]
    assert flops <= floor + sum(2 * count * s.delta.numel() for s in plan.slices)


# --- frames that the compiler leaves ---------------------------------------------------------------------------------


class Broken(nn.Module):
    """A graph break between two layers, and an integer that dynamo guards on."""

    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.up2, self.down2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.step = 0

    def forward(self, x):
        x = x + self.down(F.relu(self.up(x)))
        if self.step >= 0 and not torch.compiler.is_exporting():
            torch._dynamo.graph_break()
        return x + self.down2(F.relu(self.up2(x))) * (1 + self.step)


def broken():
    torch.manual_seed(1)
    base, x = Broken().double(), torch.randn(4, 8, dtype=torch.float64)
    model = copy.deepcopy(base)
    plan = s2ft.prepare(model, (x,), s2ft.S2FTConfig(targets={"ffn.out": 4}))
    return base, model, plan, lambda m: m(x).square().mean()


def test_after_a_graph_break():
    base, model, plan, of = broken()
    of(compiled(model)).backward()
    assert len(plan.slices) == 2
    check(base, plan, of)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_past_the_recompile_limit():
    base, model, plan, of = broken()
    net = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=6):
        for step in range(6):
            model.step = base.step = step
            model.zero_grad(set_to_none=False)
            of(net).backward()
            check(base, plan, of)


@pytest.mark.parametrize("off", ["stance", "config"])
def test_with_compilation_switched_off(off):
    base, model, plan = llama()
    if off == "stance":
        forced_eager(model)
    else:
        with torch._dynamo.config.patch(disable=True):
            loss(whole(model)).backward()
    check(base, plan)


# --- callers ---------------------------------------------------------------------------------------------------------


def test_a_submodule_and_forward_called_by_hand():
    def of(model):
        return model.lm_head(model.model(input_ids=tokens())[0]).square().mean() + model.forward(tokens()).logits.mean()

    base, model, plan = llama()
    of(model).backward()
    check(base, plan, of)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_penalty_on_a_weight(how):
    def penalty(model):
        return sum(layer.mlp.down_proj.weight.pow(2).sum() for layer in model.model.layers)

    def of(model):
        return loss(model) + 0.1 * penalty(model)

    base, model, plan = llama()
    if how == "eager":
        with pytest.warns(UserWarning, match="layers.2.mlp.down_proj.weight was made at full size"):
            of(model).backward()
    else:
        torch.compile(of, backend="s2ft", options={"inner": "aot_eager"})(model).backward()
    check(base, plan, of)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpoints_inside_own_modules(reentrant, inner):
    case, model = prepared({"ffn.out": 3, "ffn.in": 2})
    for block in model.blocks:
        block.ffn.forward = (lambda f: lambda x: checkpoint(f, x, use_reentrant=reentrant))(block.ffn.forward)
    net = model if inner == "eager" else compiled(model)
    if reentrant:  # its outputs have gradients only where an input has
        model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    case.loss(net).backward()
    assert_gradients(state_of(model).plan, full_gradients(case.make(), case.loss), NOISE64)


def test_threads_train_one_model():
    """Each makes its own graph; all gradients add up in the same deltas."""
    base, model, plan = llama()
    total = full_gradients(base, loss)
    failed = []

    def work():
        try:
            for _ in range(4):
                grads = torch.autograd.grad(loss(model), s2ft.parameters(model))
                for s, grad in zip(plan.slices, grads):
                    expected = total[s.parameter_name].index_select(s.dim, s.indices)
                    assert (grad - expected).abs().max() <= 32 * U32 * total[s.parameter_name].abs().max()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        loss(model)
    for thread in threads:
        thread.join()
    assert not failed


# --- functional calls ------------------------------------------------------------------------------------------------


def test_functional_call_with_deltas_of_its_own():
    base, model, plan = llama()
    keys = [n for n, _ in model.named_parameters() if n.endswith("_delta")]
    given = {n: 0.1 * torch.randn_like(model.get_parameter(n)) for n in keys}

    def of(deltas):
        return functional_call(model, deltas, (), {"input_ids": tokens(), "labels": tokens()}).loss

    grads = torch.func.grad(of)(given)
    before = loss(model).item()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for s in plan.slices:
            tuned.get_parameter(s.parameter_name).index_add_(
                s.dim, s.indices, given[s.parameter_name + "_delta"].double()
            )
    assert abs(of(given).item() - loss(tuned).item()) < 1e-12
    full = full_gradients(tuned, loss)
    for s in plan.slices:
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        error = (grads[s.parameter_name + "_delta"] - expected).abs().max()
        assert error <= 32 * U32 * full[s.parameter_name].abs().max()
    assert loss(model).item() == before, "the model has its own deltas again"


def test_transforms_right_after_prepare_and_after_a_change():
    """A read inside a transform has the delta, though it may not write the weight."""
    _, model, plan = llama()
    mlp, x = model.model.layers[0].mlp, torch.randn(4, 3, LLAMA["hidden_size"], dtype=torch.float64)
    for _ in range(2):
        mapped = torch.func.vmap(mlp)(x)
        value, tangent = torch.func.jvp(mlp, (x,), (torch.ones_like(x),))
        pulled = torch.func.vjp(mlp, x)[1](tangent)[0]
        torch.testing.assert_close(mapped, mlp(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(value, mlp(x), rtol=1e-12, atol=1e-12)
        assert abs((pulled.sum() - tangent.pow(2).sum()).item()) <= 1e-9 * tangent.pow(2).sum().item()
        with torch.no_grad():
            for s in plan.slices:
                s.delta.add_(0.1)


def test_functional_call_with_weights_of_its_own():
    _, model, plan = llama()
    names = [s.parameter_name for s in plan.slices]
    zeros = {n: torch.zeros_like(model.get_parameter(n)) for n in names}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = functional_call(model, zeros, (tokens(),)).logits
        plain = copy.deepcopy(model)
        with merged(plain), torch.no_grad():
            for n in names:
                plain.get_parameter(n).zero_()
            assert (plain(tokens()).logits - out).abs().max() < 1e-12
    assert all(not zero.any() for zero in zeros.values()), "nothing was written into the user's tensors"
    assert all(same_bits(before[n], p) for n, p in model.named_parameters())


def test_functional_call_in_a_graph_is_refused():
    _, model, plan = llama()
    name = plan.slices[0].parameter_name

    @torch.compile(backend="s2ft", options={"inner": "aot_eager"})
    def of(weight, x):
        return functional_call(model, {name: weight}, (x,)).logits.sum()

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="an argument in the base order"):
        of(torch.zeros_like(model.get_parameter(name)), tokens())


# --- writes ----------------------------------------------------------------------------------------------------------

WRITES = {
    "in place": lambda p, new: p.copy_(new),
    ".data.copy_": lambda p, new: p.data.copy_(new),
    ".data = ": lambda p, new: setattr(p, "data", new.clone()),
    ".data.add_": lambda p, new: p.data.add_(new - p.data),
    "detached": lambda p, new: p.detach().copy_(new),
    "memory": lambda p, new: p.data.numpy().__setitem__(slice(None), new.numpy()),
}


@pytest.mark.parametrize(
    "how, write",
    [*(("eager", w) for w in WRITES), ("whole", ".data.copy_"), ("whole", ".data = "), ("by layer", "memory")],
)
def test_a_delta_written_by_any_road_is_in_the_weight(how, write):
    base, model, plan = llama()
    run = WAYS[how](model)
    loss(run).backward()
    for round in range(2):
        with torch.no_grad():
            for i, p in enumerate(s2ft.parameters(model)):
                WRITES[write](p, torch.full_like(p, 0.01 * (i + 1) * (round + 1)))
        expected = copy.deepcopy(base)
        with torch.no_grad():
            for i, s in enumerate(plan.slices):
                W = expected.get_parameter(s.parameter_name)
                block = W.index_select(s.dim, s.indices) + torch.full_like(s.delta, 0.01 * (i + 1) * (round + 1))
                W.index_copy_(s.dim, s.indices, block)
            own, plain = loss(run).item(), loss(expected.train()).item()
            assert abs(own - plain) < 32 * U32 * plain  # norms and rotations are float32 inside
        model.zero_grad()
        loss(run).backward()
        check(expected, plan)
        assert all(torch.equal(b.read(), b.trained()) for b in state_of(model).blocks)


@pytest.mark.parametrize("behind", [False, True], ids=["in place", "through .data"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_average_over_steps_computes_what_the_averaged_deltas_say(behind, dtype):
    """Of all of a model's parameters, as averages are kept: what they make of a weight's block is not what is used."""
    _, model, _ = llama()
    model.to(dtype)
    kept = copy.deepcopy(model)
    optimizer = torch.optim.SGD(s2ft.parameters(model), lr=0.3)
    for _ in range(4):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, now in zip(kept.parameters(), model.parameters(), strict=True):
                (average.data if behind else average).lerp_(now, 0.2)
            loss(kept)
        assert all(torch.equal(b.read(), b.trained()) and b.delta.any() for b in state_of(kept).blocks)


def test_vectors_of_parameters_and_averages():
    base, model, plan = llama()
    deltas = s2ft.parameters(model)
    vector = 0.01 * torch.randn(sum(p.numel() for p in deltas))
    torch.nn.utils.vector_to_parameters(vector, deltas)
    with torch.no_grad():
        swapped = loss(model).item()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        assert averaged(input_ids=tokens(), labels=tokens()).loss.item() == swapped
    torch.nn.utils.vector_to_parameters(torch.zeros_like(vector), deltas)
    assert abs(loss(model).item() - loss(base.train()).item()) < 1e-12 and swapped != loss(model).item()
    assert averaged(input_ids=tokens(), labels=tokens()).loss.item() == swapped


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["", "model.layers.1.mlp.down_proj"])
def test_loading_weights_takes_the_blocks_as_trained(assign, part):
    base, model, plan = llama()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in s2ft.parameters(twin):
            p.copy_(0.1 * torch.randn_like(p))
        trained = loss(twin).item()
    model.get_submodule(part).load_state_dict(copy.deepcopy(twin.get_submodule(part).state_dict()), assign=assign)
    for block, other in zip(state_of(model).blocks, state_of(twin).blocks):
        if block.name.startswith(part):
            assert (block.delta - other.delta).abs().max() <= U32 and block.delta.any()
            assert block.weight is dict(model.named_parameters())[block.name]
    if not part:
        assert abs(loss(model).item() - trained) < 1e-6
        with s2ft.disabled(model):
            assert loss(model).item() == loss(base.train()).item()
    loss(model).backward()
    torch.optim.SGD(s2ft.parameters(model), lr=0.1).step()
    assert all(torch.equal(b.read(), b.trained()) for b in blocks_in(model))


def test_loading_weights_of_another_order_or_base_is_refused():
    base, model, _ = llama()
    _, other, _ = llama()
    s2ft.release(other)
    s2ft.prepare(other, (tokens(),), s2ft.S2FTConfig(targets=TARGETS, seed=1))
    before = snapshot(model)
    for weights in (base.state_dict(), other.state_dict(), {n: w + 1 for n, w in model.state_dict().items()}):
        with pytest.raises(StateError, match="not in this prepared model's order or not of its base"):
            model.load_state_dict(weights)
        assert_unchanged(model, before)


@pytest.mark.parametrize("behind", [False, True], ids=["in place", "through .data"])
def test_an_edit_of_a_trained_weight_is_refused_and_not_half_undone(behind):
    _, model, plan = llama()
    loss(model)
    name = plan.slices[0].parameter_name
    held = dict(model.named_parameters())[name]
    with torch.no_grad():
        (held.data if behind else held).mul_(0.5)
    edited = dict(model.named_parameters())[name].detach().clone()
    with pytest.raises(StateError, match=f"{name} was changed in place"):
        loss(model)
    s2ft.release(model)
    assert same_bits(model.get_parameter(name).sort(plan.slices[0].dim)[0], edited.sort(plan.slices[0].dim)[0])


REPLACED = {
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros_like(layer._parameters["weight"]))),
    "assigned, not as a parameter": lambda layer: setattr(layer, "weight", torch.zeros(16, 24)),
    "deleted": lambda layer: delattr(layer, "weight"),
    "its data": lambda layer: setattr(layer.weight, "data", torch.zeros(16, 24)),
    "an entry": lambda layer: layer.weight.__setitem__(0, 0.0),
    "in place": lambda layer: layer.weight.detach_().mul_(2),
    "pruned": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
    "normalized": lambda layer: torch.nn.utils.spectral_norm(layer, "weight"),
}


@pytest.mark.parametrize("how", REPLACED)
def test_a_trained_weight_is_not_replaced(how):
    _, model, _ = llama()
    layer, before = model.model.layers[1].mlp.down_proj, loss(model)
    with pytest.raises((StateError, TypeError), match="weight"):
        REPLACED[how](layer)
    assert layer._forward_pre_hooks == {} and torch.equal(loss(model), before)


def test_other_ways_of_sharding_are_refused_by_name(monkeypatch):
    case, model = prepared()
    block = state_of(model).blocks[0]
    (module, key), *_ = block.places
    with monkeypatch.context() as patched, pytest.raises(StateError, match="FSDP1.*use FSDP2"):
        patched.setattr("torch.distributed.is_initialized", lambda: True)
        delattr(module, key)  # as FSDP1 does
    block.weight.ds_id = 0  # as DeepSpeed marks what it takes apart
    with pytest.raises(StateError, match="ZeRO-3.*use FSDP2"):
        model(*case.inputs)
    base = case.make()
    next(base.parameters()).ds_id = 0
    with pytest.raises(StateError, match="ZeRO-3.*use FSDP2"):
        s2ft.prepare(base, case.inputs, s2ft.S2FTConfig({"ffn.out": 2}))


def test_a_weight_that_is_tied_again_is_the_same():
    _, model, _ = llama(tie_word_embeddings=True)
    before = snapshot(model)
    model.tie_weights()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = layer.weight
    assert_unchanged(model, before)


def test_a_model_that_lost_a_layer_is_no_obstacle_to_others_and_whole_once_it_has_it_again():
    _, broken, _ = llama()
    before, layers = snapshot(broken), broken.model.layers
    broken.model.layers = layers[:1]
    with pytest.raises(StateError, match=r"layers\.1.*not in this model as it was prepared"):
        s2ft.release(broken)
    _, model, _ = llama()
    loss(model).backward()
    torch.optim.SGD(s2ft.parameters(model), lr=0.1).step()
    broken.model.layers = layers
    assert_unchanged(broken, before)


def test_a_write_that_left_the_block_as_it_was_is_no_edit():
    """As when DistributedDataParallel sends the first process's weights to all."""
    _, model, _ = llama()
    loss(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.clone())
    loss(model).backward()


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.AdamW])
def test_a_step_with_a_closure(make):
    base, model, plan = llama()
    optimizer = make(s2ft.parameters(model), lr=0.01)

    def closure():
        optimizer.zero_grad()
        total = loss(model)
        total.backward()
        return total

    first = optimizer.step(closure)
    with torch.no_grad():
        assert loss(model) < first
    assert all(torch.equal(b.read(), b.trained()) and b.delta.any() for b in state_of(model).blocks)


def test_a_closure_that_reaches_no_slice_is_refused():
    _, model, _ = llama()
    optimizer = torch.optim.SGD(s2ft.parameters(model), lr=0.01)
    with pytest.raises(StateError, match="slices .* have no gradient"):
        optimizer.step(lambda: torch.zeros(()))


def test_an_optimizer_made_before_its_model_was_prepared_is_told():
    base, model, _ = llama()
    plain = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(plain.parameters())
    s2ft.prepare(plain, (tokens(),), s2ft.S2FTConfig(targets=TARGETS))
    loss(plain).backward()
    with pytest.raises(StateError, match="was made before the model was prepared"):
        optimizer.step()
    torch.optim.AdamW(plain.parameters()).step()


# --- the module stays what it was ------------------------------------------------------------------------------------


class Walk(nn.Sequential):
    def forward(self, x):
        for i, layer in enumerate(self):
            x = layer(x)
            if i < len(self) - 1:
                x = x.relu()
        return x


def walk():
    torch.manual_seed(0)
    return Walk(nn.Linear(5, 8), nn.Linear(8, 5)).double(), torch.randn(3, 5, dtype=torch.float64)


def test_a_container_has_the_children_it_had():
    base, x = walk()
    base.s2ft = nn.Identity()  # a child of the user's own
    base.plain = "mine"
    model = copy.deepcopy(base)
    del base.s2ft, model.s2ft
    model.register_module("s2ft", nn.Identity())
    own = model.s2ft
    s2ft.prepare(model, (x,), s2ft.S2FTConfig(targets={"ffn.out": 2}))
    assert len(model) == 3 and model.s2ft is own and list(model.children())[-1] is own
    assert isinstance(model[1], nn.Linear) and repr(model[1]) == repr(base[1])
    assert [n for n in model.state_dict() if not n.endswith("_delta")] == list(base.state_dict())
    s2ft.release(model)
    assert model.s2ft is own and type(model[1]) is nn.Linear and "_s2ft" not in vars(model[1])
    assert list(dict(model.named_parameters())) == list(dict(base.named_parameters()))


def test_disabled_is_the_base_bit_for_bit_in_a_container_that_counts():
    base, x = walk()
    model = copy.deepcopy(base)
    s2ft.prepare(model, (x,), s2ft.S2FTConfig(targets={"ffn.out": 2}))
    assert torch.allclose(model(x), base(x), rtol=1e-14, atol=1e-14)
    with s2ft.disabled(model):
        assert same_bits(model(x), base(x))


class Names(nn.Module):
    """Two weights whose names become one where dots become underscores, and a delta's name that is taken."""

    def __init__(self):
        super().__init__()
        for outer, inner in (("a", "b__c"), ("a__b", "c")):
            ffn = nn.Module()
            ffn.register_module(inner, nn.Linear(8, 6, bias=False))
            ffn.up = nn.Linear(6, 8)
            self.register_module(outer, ffn)
        self.a.b__c.weight_delta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x + self.a.b__c(self.a.up(x).relu()) * self.a.b__c.weight_delta
        return x + self.a__b.c(self.a__b.up(x).relu())


def test_names_that_collide():
    model, x = Names(), torch.randn(4, 6)
    plan = s2ft.prepare(model, (x,), s2ft.S2FTConfig(targets={"ffn.out": 2}))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(plan.slices) == 2 and trains == {"a.b__c.weight_delta_", "a__b.c.weight_delta"}


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_train_apart(copied):
    base, model, plan = llama()
    with torch.no_grad():
        for p in s2ft.parameters(model):
            p.fill_(0.01)
    if copied == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    assert loss(twin).item() == loss(model).item()
    loss(twin).backward()
    torch.optim.SGD(s2ft.parameters(twin), lr=1.0).step()
    assert all(p.grad is None and (p == 0.01).all() for p in s2ft.parameters(model))
    assert loss(twin).item() != loss(model).item()
    s2ft.release(twin)
    assert type(twin.model.layers[0].mlp.down_proj) is nn.Linear
    with s2ft.disabled(model):
        assert loss(model).item() == loss(base.train()).item()


# --- who else holds it -----------------------------------------------------------------------------------------------


def test_two_models_over_one_module_and_one_inside_another_are_refused():
    case, model = prepared()
    outer = nn.Sequential(model)
    before = snapshot(model)
    with pytest.raises(StateError, match="belongs to another prepared model"):
        s2ft.prepare(outer, case.inputs)
    with pytest.raises(StateError, match="belongs to another prepared model"):
        s2ft.prepare(model.blocks[0], (torch.randn(2, 4, 6, dtype=torch.float64),))
    sharing = drawn().make()
    sharing.blocks[0].ffn.up = model.blocks[0].ffn.up  # permuted there, but no slice
    with pytest.raises(StateError, match="belongs to another prepared model"):
        s2ft.prepare(sharing, case.inputs)
    assert_unchanged(model, before)


def test_a_model_that_is_wrapped_already_is_refused(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = drawn()
        wrapped = DistributedDataParallel(case.make())
        with pytest.raises(StateError, match="call s2ft.prepare first and wrap the prepared model"):
            s2ft.prepare(wrapped, case.inputs, s2ft.S2FTConfig({"ffn.out": 2}))
        s2ft.prepare(wrapped.module, case.inputs, s2ft.S2FTConfig({"ffn.out": 2}))
        again = DistributedDataParallel(wrapped.module)
        case.loss(again).backward()
        full = full_gradients(case.make(), case.loss)
        assert_gradients(state_of(again).plan, full, NOISE64)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("where", ["s2ft_compile.slices.blocks.Block.install", "s2ft_compile.preparation.State"])
def test_prepare_changes_everything_or_nothing(where, monkeypatch):
    case = drawn()
    model = case.make()
    before = snapshot(model)
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        raise RuntimeError("no room")

    monkeypatch.setattr(where, fails)
    with pytest.raises(RuntimeError, match="no room"):
        s2ft.prepare(model, case.inputs, s2ft.S2FTConfig({"ffn.out": 2}))
    monkeypatch.undo()
    assert calls
    assert_unchanged(model, before)
    s2ft.prepare(model, case.inputs, s2ft.S2FTConfig({"ffn.out": 2}))


# --- eager products --------------------------------------------------------------------------------------------------


class Products(nn.Module):
    """Every form of product that has a partial backward, and one that has none."""

    FORMS = {
        "linear": lambda x, W, b: F.linear(x, W, b),
        "linear by keywords": lambda x, W, b: F.linear(input=x, weight=W, bias=b),
        "matmul": lambda x, W, b: x @ W.t() + b,
        "matmul by keywords": lambda x, W, b: torch.matmul(input=x, other=W.transpose(dim0=0, dim1=1)) + b,
        "mT": lambda x, W, b: torch.matmul(x, W.mT) + b,
        "left": lambda x, W, b: (W @ x.mT).mT + b,
        "addmm": lambda x, W, b: torch.addmm(b, x.flatten(0, 1), W.T).unflatten(0, x.shape[:2]),
        "permuted": lambda x, W, b: x @ W.permute(1, 0) + b,
        "bmm": lambda x, W, b: torch.bmm(x, W.t().unsqueeze(0).expand(len(x), -1, -1)) + b,
        "cast": lambda x, W, b: F.linear(x.float(), W.to(torch.float32), b.float()).double(),
        "twice": lambda x, W, b: F.linear(x, W, b) + F.linear(x.sin(), W),
        "einsum": lambda x, W, b: torch.einsum("btd,ed->bte", x, W) + b,
    }


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranges", [((0, 2),), ((1, 1), (3, 2))])
@pytest.mark.parametrize("form", Products.FORMS)
def test_eager_products(form, dim, ranges):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64, requires_grad=True)
    D = nn.Parameter(torch.zeros(W.movedim(dim, 0)[: sum(n for _, n in ranges)].movedim(0, dim).shape))
    weight = eager.attached(W, D, dim, ranges, "W")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients = torch.autograd.grad(Products.FORMS[form](x, weight, b).pow(3).sum(), (x, b, D))
    full = W.clone().requires_grad_()
    dx, db, dW = torch.autograd.grad(Products.FORMS[form](x, full, b).pow(3).sum(), (x, b, full))
    expected = torch.cat([dW.narrow(dim, s, n) for s, n in ranges], dim)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if form == "cast" else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(
        gradients[0], dx, rtol=1e-4 if form == "cast" else 1e-12, atol=1e-4 if form == "cast" else 1e-12
    )
    torch.testing.assert_close(gradients[1], db, **tolerance)
    torch.testing.assert_close(gradients[2].double(), expected, **tolerance)


@pytest.mark.parametrize("form", ["linear", "addmm", "matmul"])
def test_a_weight_and_its_bias_train_together(form, recwarn):
    x, values = torch.randn(2, 7, 5, dtype=torch.float64), (torch.randn(6, 5).double(), torch.randn(6).double())
    deltas = [nn.Parameter(torch.zeros(2, *t.shape[1:])) for t in values]
    read = [eager.attached(t, D, 0, ((1, 1), (3, 1)), "W") for t, D in zip(values, deltas, strict=True)]
    total = Products.FORMS[form](x, *read).pow(3).sum()
    with FlopCounterMode(display=False) as count:
        gradients = torch.autograd.grad(total, deltas)
    full = [t.clone().requires_grad_() for t in values]
    expected = torch.autograd.grad(Products.FORMS[form](x, *full).pow(3).sum(), full)
    for D, dW in zip(gradients, expected, strict=True):
        torch.testing.assert_close(D.double(), dW[[1, 3]], rtol=1e-6, atol=1e-6)
    assert count.get_total_flops() == 2 * x.numel() * 2, "two rows of the weight"
    assert not [w for w in recwarn if "full size" in str(w.message)]


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_eager_experts(implementation, dim, recwarn):
    import transformers as t

    torch.manual_seed(0)
    config = t.MixtralConfig(
        **{**LLAMA, "num_hidden_layers": 1}, num_local_experts=3, num_experts_per_tok=2, output_router_logits=False
    )
    base = t.MixtralForCausalLM(config)
    base.set_experts_implementation(implementation)
    full = copy.deepcopy(base).train()
    loss(full).backward()
    experts = base.model.layers[0].mlp.experts
    name = "down_proj" if dim == 2 else "gate_up_proj"
    W = experts._parameters[name].requires_grad_(False)
    D = nn.Parameter(torch.zeros_like(W.narrow(dim, 1, 3)))
    del experts._parameters[name]
    read = eager.attached(W, D, dim, ((1, 3),), name)
    object.__setattr__(experts, name, read)
    loss(base.train()).backward()
    expected = full.model.layers[0].mlp.experts.get_parameter(name).grad.narrow(dim, 1, 3)
    torch.testing.assert_close(D.grad, expected, rtol=2e-5, atol=1e-6)
    assert not [w for w in recwarn if "full size" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_under_autocast(dtype):
    """As stock eager autocast rounds: the same casts, so the same bits but for the order of one product's sums."""
    case, model = prepared({"ffn.out": 3, "ffn.in": 2})
    model, base = model.float(), case.make().float()
    with torch.autocast("cpu", dtype):
        case.loss(model).backward()
        full = full_gradients(base, case.loss)
    for s in state_of(model).plan.slices:
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        assert (s.delta.grad - expected).abs().max() <= 4 * torch.finfo(dtype).eps * full[s.parameter_name].abs().max()


def test_embeddings_have_a_partial_backward(recwarn):
    table, ids = torch.randn(9, 6), torch.randint(0, 9, (2, 7))
    D = nn.Parameter(torch.zeros(9, 3))
    for padding in (None, 2):
        weight = eager.attached(table, D, 1, ((1, 2), (5, 1)), "E")
        (gradients,) = torch.autograd.grad(F.embedding(ids, weight, padding).pow(3).sum(), D)
        full = table.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.embedding(ids, full, padding).pow(3).sum(), full)
        torch.testing.assert_close(gradients, expected[:, [1, 2, 5]], rtol=0, atol=0)
    assert not [w for w in recwarn if "full size" in str(w.message)]
