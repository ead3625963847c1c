"""`lean_saving`: the same gradients bit for bit, from fewer saved tensors; nothing that was written over is used."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from small import QUICK, cases, hf, same_bits, tokens
from torch import nn

from s2ft_compile.passes.select.lean_saving import Kept, Remade, _Recorder, lean_saving


def gradients(loss, parameters, constants=None):
    """The gradients of loss(), with lean saving if there are constants."""
    if constants is None:
        return torch.autograd.grad(loss(), parameters, allow_unused=True)
    with lean_saving(constants):
        value = loss()
    return torch.autograd.grad(value, parameters, allow_unused=True)


def assert_same_bits(loss, parameters, constants):
    for plain, lean in zip(gradients(loss, parameters), gradients(loss, parameters, constants), strict=True):
        assert (plain is None) == (lean is None) and (plain is None or same_bits(plain, lean))


@given(cases())
@settings(phases=QUICK)
def test_gradients_of_drawn_models_keep_their_bits(case):
    model = case.make()
    assert_same_bits(lambda: case.loss(model), list(model.parameters()), [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_hugging_face_models_keep_their_bits(name, dtype):
    model, ids = hf(name).to(dtype), tokens()
    assert_same_bits(
        lambda: model(input_ids=ids, labels=ids).loss, list(model.parameters()), [*model.parameters(), *model.buffers()]
    )


def packed_by(function, *constants):
    """What a forward packs, in order."""
    recorder, packed = _Recorder(constants), []

    def pack(t):
        packed.append(recorder.pack(t))
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, recorder.unpack), recorder:
        value = function()
    return value, [source for source, _ in packed]


def test_a_gated_product_keeps_gate_and_up_alone():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 5, 4), [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    gate, up, down = weights

    def forward():
        return ((F.silu(x @ gate) * (x @ up)) @ down).sum()

    value, sources = packed_by(forward, x, *weights)
    kept = {s.tensor.untyped_storage()._cdata for s in sources if isinstance(s, Kept)}
    assert len(kept - {t.untyped_storage()._cdata for t in (x, *weights)}) == 2
    assert sum(isinstance(s, Remade) for s in sources) == 2, "silu(gate), and its product with up"
    value.backward()
    gradient, gate.grad = gate.grad, None
    forward().backward()
    assert same_bits(gradient, gate.grad)


def test_random_operators_are_not_repeated():
    W = nn.Parameter(torch.randn(6, 6))
    _, sources = packed_by(lambda: (F.dropout(W * 1.0, 0.5) @ W).sum(), W)
    kept = {s.tensor.untyped_storage()._cdata for s in sources if isinstance(s, Kept)}
    assert kept - {W.untyped_storage()._cdata}
    torch.manual_seed(0)
    plain = gradients(lambda: (F.dropout(W * 1.0, 0.5) @ W).sum(), [W])
    torch.manual_seed(0)
    assert same_bits(gradients(lambda: (F.dropout(W * 1.0, 0.5) @ W).sum(), [W], [W])[0], plain[0])


def test_what_is_written_over_is_not_what_was_there():
    """r is twice the d before, the sine saves the d after: r must not be made from that."""
    x, W = torch.randn(5, 4), nn.Parameter(torch.randn(4, 4))

    def forward(write):
        d = (x @ W).sin() * 3
        r = d * 2
        d = d.add_(1) if write else d + 1
        return (d.sin() + r @ W).sum()

    assert same_bits(gradients(lambda: forward(True), [W], [x, W])[0], gradients(lambda: forward(False), [W])[0])


def test_a_buffer_that_the_forward_itself_updates():
    x, W, count = torch.randn(5, 4), nn.Parameter(torch.randn(4, 4)), torch.zeros(4)

    def forward():
        with torch.no_grad():
            count.add_(1)
        return (x @ W * count).sum()

    (first,) = gradients(forward, [W], [x, W, count])
    assert same_bits(first, gradients(forward, [W])[0] / 2), "the second time it counts 2"


def test_operators_that_write_in_place():
    """What is made from memory before it is written over cannot be made from it afterwards."""
    x, W = torch.randn(5, 4), nn.Parameter(torch.randn(4, 4))

    def forward():
        a = x @ W
        b = a.sin()  # saves a
        c = (a * 2).relu_() @ W  # relu_ writes over a * 2
        d = b * 3
        e = (d @ W).cos()
        d.zero_()  # d is saved by the product: kept or made again, never read as zeros
        return (c + e).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(forward, [W])
    value, sources = packed_by(forward, x, W)
    value.backward()  # b * 3 is made again from b or a, not read from d
    gradient, W.grad = W.grad, None

    def harmless():
        a = x @ W
        b = a.sin()
        return ((a * 2).relu_() @ W + (b * 3 @ W).cos()).sum()

    assert same_bits(gradient, gradients(harmless, [W])[0])


def test_a_kept_tensor_that_was_written_over_is_noticed():
    x, W = torch.randn(5, 4), nn.Parameter(torch.randn(4, 4))

    def forward():
        a = x @ W
        b = a.sin()
        a.zero_()
        return b.sum()

    value, _ = packed_by(forward, x, W)
    with pytest.raises(RuntimeError, match=r"shape \(5, 4\) that the backward needs was written over"):
        value.backward()
