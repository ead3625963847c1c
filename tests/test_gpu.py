"""On a CUDA GPU: the same gradients, and what only a GPU has. `make gpu-test` runs these, nothing else does."""

import copy

import pytest
import torch
from small import U32, assert_gradients, assert_weights, compiled, full_gradients, hf, tokens, tuned
from test_quantized import IDS, quantized

import s2ft_compile as s2ft

pytestmark = pytest.mark.gpu
TARGETS = {"attention.out": 1, "attention.value": 1, "attention.query": 2, "ffn.in": 3, "ffn.out": 5}
FAMILIES = ("llama", "qwen2", "gpt2", "bert")


def loss_of(ids):
    return lambda model: model(input_ids=ids, labels=ids).loss


def on_gpu(family: str, dtype=torch.float32):
    """The model and its inputs on the GPU, and a float64 copy with its inputs on the CPU."""
    model, ids = hf(family).to("cuda", dtype), tokens()
    return model, ids.cuda(), copy.deepcopy(model).to("cpu", torch.float64), ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_float32_gradients_are_those_of_the_cpu_in_float64(family, inner):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, ids, base, cpu_ids = on_gpu(family)
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    loss_of(ids)(compiled(model, inner)).backward()
    full = {n: g.cuda() for n, g in full_gradients(base, loss_of(cpu_ids)).items()}
    cuda_plan = copy.copy(plan)
    for s in cuda_plan.slices:
        object.__setattr__(s, "indices", s.indices.cuda())
    assert_gradients(cuda_plan, full, 64 * 10 * U32)  # sums of at most 64 products, through some ten layers


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients_are_close(family):
    model, ids, base, cpu_ids = on_gpu(family, torch.bfloat16)
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    loss_of(ids)(compiled(model, "inductor")).backward()
    full = full_gradients(base, loss_of(cpu_ids))
    for s in plan.slices:  # 2^-8 a rounding, some forty on the way, mostly independent
        expected = full[s.parameter_name].index_select(s.dim, s.indices)
        error = (s.delta.grad.cpu().double() - expected).norm()
        assert error <= 40**0.5 * 2**-8 * 4 * full[s.parameter_name].norm(), s.parameter_name


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_steps_write_the_weights(mode):
    """With CUDA graphs too, the weights after each step are cast(W0 + delta)."""
    model, ids, _, _ = on_gpu("llama", torch.bfloat16)
    base = copy.deepcopy(model).cpu()
    plan = s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    net = torch.compile(model, backend="s2ft", mode=mode)
    optimizer = torch.optim.AdamW(s2ft.parameters(model), lr=1e-3, fused=True)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(ids)(net)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    s2ft.release(model)
    cpu_plan = copy.copy(plan)
    for s in cpu_plan.slices:
        object.__setattr__(s, "delta", s.delta.detach().cpu())
    assert_weights(model.cpu(), tuned(base, cpu_plan))


@pytest.mark.parametrize(
    "options",
    [
        {"logits": False},
        {"logits": False, "activation_budget": 0.3},
        {"logits": False, "mode": "reduce-overhead"},
        {"kernels": False},
    ],
    ids=str,
)
def test_options_leave_gradients_as_they_are(options):
    """In float32: each differs from the plain graph by the order of sums of at most 64 products, in some ten layers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    grads = []
    for how in ({}, options):
        torch._dynamo.reset()
        model, ids, _, _ = on_gpu("llama")
        s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
        loss_of(ids)(compiled(model, "inductor", **how)).backward()
        grads.append([d.grad.clone() for d in s2ft.parameters(model)])
    for plain, other in zip(*grads):
        assert (plain - other).abs().max() <= 64 * 10 * U32 * plain.abs().max()


def test_micro_batches_add_up_in_cuda_graphs():
    """Their gradients lie in one memory, and are copied out of it: the sum is that of single backwards."""
    model, ids, _, _ = on_gpu("llama", torch.bfloat16)
    s2ft.prepare(model, {"input_ids": ids}, s2ft.S2FTConfig(targets=TARGETS))
    net, batches, parts = compiled(model, "inductor", mode="reduce-overhead"), [ids, ids.flip(0)], []
    for turn in range(4):  # warmed up, recorded, replayed twice
        model.zero_grad()
        loss_of(batches[turn % 2])(net).backward()
        parts.append([delta.grad.clone() for delta in s2ft.parameters(model)])
    model.zero_grad()
    for batch in batches:
        loss_of(batch)(net).backward()
    for delta, even, odd in zip(s2ft.parameters(model), *parts[2:]):
        assert torch.equal(delta.grad, even + odd)


@pytest.mark.parametrize("logits", [True, False])
def test_predicted_memory(logits):
    """`s2ft.estimate` against the allocator's peak of a step."""
    sizes = dict(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        head_dim=64,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    ids = torch.randint(32000, (2, 1024))
    model = hf("llama", **sizes).to(torch.bfloat16).train()
    estimate = s2ft.estimate(
        copy.deepcopy(model).to("meta"), {"input_ids": ids, "labels": ids}, options=s2ft.CompileOptions(logits=logits)
    )
    model, ids = model.cuda(), ids.cuda()
    s2ft.prepare(model, {"input_ids": ids})
    net = compiled(model, "inductor", logits=logits)
    optimizer = torch.optim.AdamW(s2ft.parameters(model), fused=True)
    for step in range(3):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        output = net(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert torch.cuda.max_memory_allocated() == pytest.approx(estimate.total, rel=0.1)


def test_fp8_products_are_those_of_the_cpu():
    """On a GPU sums of products have some 14 bits, and what Inductor fuses with its rounding falls to the other side
    now and then. What fp8 itself changes is some 5%."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 in its matrix units")
    gradients = []
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        model = quantized("fp8", dtype=torch.bfloat16).to(device)
        s2ft.prepare(model, {"input_ids": IDS.to(device)}, s2ft.S2FTConfig(TARGETS))
        loss_of(IDS.to(device))(compiled(model.train(), "inductor", fp8=True)).backward()
        gradients.append([delta.grad.cpu() for delta in s2ft.parameters(model)])
    for exact, fast in zip(*gradients):
        assert (exact - fast).norm() <= 0.05 * exact.norm()
