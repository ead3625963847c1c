"""Many adapters behind one model: switched and fused bit for bit, and one for each row of a batch."""

import copy
import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import hf, randomize, same_bits, tokens
from torch import nn

import s2ft_compile as s2ft
from s2ft_compile.adapters.bank import AdapterBank
from s2ft_compile.adapters.batched import Stack, products_by_id
from s2ft_compile.adapters.format import read_adapter
from s2ft_compile.errors import AdapterError, ExportError, StateError
from s2ft_compile.exporters import load_adapter, save_adapter

TARGETS = {
    "a": {"ffn.out": 5, "attention.out": 1},
    "b": {"ffn.out": 3, "ffn.in": 2},
    "c": {"attention.value": 1},
    "d": {"ffn.in": 0.3, "attention.query": 1},
}
U32 = 2.0**-24


def saved(tmp_path_factory, kind: str):
    root, base = tmp_path_factory.mktemp(kind), hf(kind)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        model = copy.deepcopy(base)
        s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets=targets, seed=seed))
        randomize(model, seed)
        save_adapter(model, root / name)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory, "llama")


def bank_of(folder, kind: str = "llama", dtype=torch.float32) -> AdapterBank:
    bank = AdapterBank(hf(kind, use_cache=True).to(dtype))
    for name in TARGETS:
        bank.add(name, folder / name)
    return bank


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


def alone(folder, name: str | None, kind: str = "llama") -> nn.Module:
    model = hf(kind, use_cache=True)
    if name is not None:
        load_adapter(model, folder / name)
    return model


def close(outputs, expected) -> None:
    """Float32, layers of at most 64 terms, two blocks: rounding of the largest entry, as often as it can add up."""
    torch.testing.assert_close(outputs, expected, rtol=0, atol=2**9 * U32 * float(expected.abs().max()))


# --- in the weights ---------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([*TARGETS, None]), min_size=1, max_size=5), st.booleans())
def test_switching_is_exact_and_reversible(folder, names, add_between):
    bank = bank_of(folder)
    before, places = weights(bank.model), {n: p.data_ptr() for n, p in bank.model.named_parameters()}
    for name in names:
        bank.activate(name)
        assert same(weights(bank.model), weights(alone(folder, name)))
        if add_between:
            bank.add("again", folder / "a")  # checked against the base, whatever is active
            bank.remove("again")
            assert same(weights(bank.model), weights(alone(folder, name)))
    with bank.using("b"):
        assert same(weights(bank.model), weights(alone(folder, "b")))
    assert same(weights(bank.model), weights(alone(folder, names[-1])))
    bank.activate(None)
    assert same(weights(bank.model), before) and bank.active == ()
    assert {n: p.data_ptr() for n, p in bank.model.named_parameters()} == places


@given(st.dictionaries(st.sampled_from(list(TARGETS)), st.sampled_from([1.0, 0.5, -1.0]), min_size=1))
def test_fusing_adds_every_delta_and_reports_what_they_share(folder, chosen):
    """Oracle: dense deltas, added in float32 in the order of the names."""
    bank = bank_of(folder)
    before = weights(bank.model)
    bank.activate("c")
    shared = bank.fuse(chosen)
    expected, touched = {n: W.clone() for n, W in before.items()}, {}
    for name, weight in chosen.items():
        touched[name] = {n: torch.zeros_like(W, dtype=torch.bool) for n, W in before.items()}
        for s in read_adapter(folder / name).slices:
            expected[s.parameter_name].index_add_(s.dim, s.indices, s.delta * weight)
            touched[name][s.parameter_name].index_fill_(s.dim, s.indices, True)
    assert same(weights(bank.model), expected)
    for (a, b), count in shared.items():
        assert count == sum(int((touched[a][n] & touched[b][n]).sum()) for n in before)
    bank.activate(None)
    assert same(weights(bank.model), before)


# --- one for each row -------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([*TARGETS, None]), min_size=1, max_size=5), st.integers(0, 9))
def test_each_row_is_that_of_its_adapter_alone(folder, ids, seed):
    bank, inputs = bank_of(folder), tokens(len(ids), 6, seed)
    with torch.no_grad(), bank.batch(ids):
        outputs = bank.model(inputs).logits
    for i, name in enumerate(ids):
        close(outputs[i], alone(folder, name)(inputs[i : i + 1]).logits[0].detach())
    close(bank.model(inputs).logits.detach(), alone(folder, None)(inputs).logits.detach())  # nothing is left behind


@given(st.lists(st.tuples(st.sampled_from([*TARGETS, None]), st.integers(1, 4)), min_size=1, max_size=6))
def test_packed_requests_have_the_adapters_of_their_tokens(folder, requests):
    """Of one token each, and of several, in one row of a layer whose slices are rows and columns."""
    ids, lengths = [name for name, _ in requests], [length for _, length in requests]
    bank, x = bank_of(folder), torch.randn(1, sum(lengths), 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), bank.batch(ids, lengths):
        outputs = bank.model.model.layers[1].mlp(x)
    with torch.no_grad(), bank.batch(ids, lengths):  # a step like the one before
        assert torch.equal(bank.model.model.layers[1].mlp(x), outputs)
    outputs = outputs.split(lengths, 1)
    for name, part, y in zip(ids, x.split(lengths, 1), outputs):
        close(y, alone(folder, name).model.layers[1].mlp(part).detach())


def live_bytes() -> int:
    gc.collect()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_dense(t)}
    return sum(held.values())


def is_dense(value: object) -> bool:
    return type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"


def test_a_removed_adapter_gives_its_memory_back(folder):
    """Whatever was done with it: stacks, blocks of weights, deltas; and an adapter that only runs in batches costs its
    deltas and their stacks, no copies of blocks."""
    bank = bank_of(folder)
    with torch.no_grad(), bank.batch(["a", "b"]):
        bank.model(tokens())
    before = live_bytes()
    bank.add("again", folder / "a")
    numbers = sum(s.delta.numel() for s in read_adapter(folder / "a").slices)
    with torch.no_grad(), bank.batch(["again", "b"]):
        bank.model(tokens())
    added = live_bytes() - before
    assert added >= 2 * 4 * numbers
    with torch.no_grad(), bank.batch(["again", "b"], [2, 1]):
        bank.model.model.layers[0].mlp(torch.zeros(3, 16))
    bank.activate("again")
    assert live_bytes() - before - added >= 2 * 4 * numbers  # the blocks with it and without
    bank.fuse({"again": 0.5, "b": 1.0})
    bank.remove("again")
    with torch.no_grad(), bank.batch(["a", "b"]):
        bank.model(tokens())
    assert live_bytes() == before


def test_fused_and_transposed_layers(tmp_path_factory):
    kind = "gpt2"
    root, ids = saved(tmp_path_factory, kind), ["a", None, "b", "d", "c"]
    bank, inputs = bank_of(root, kind), tokens(5)
    with torch.no_grad(), bank.batch(ids):
        outputs = bank.model(inputs).logits
    for i, name in enumerate(ids):
        close(outputs[i], alone(root, name, kind)(inputs[i : i + 1]).logits[0].detach())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_with_a_cache_gives_the_tokens_of_each_adapter_alone(folder, options):
    bank, inputs, ids = bank_of(folder), tokens(4), ["a", None, "d", "b"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with bank.batch(ids):
        outputs = bank.model.generate(inputs, **options)
    for i, name in enumerate(ids):
        assert torch.equal(outputs[i], alone(folder, name).generate(inputs[i : i + 1], **options)[0])


def test_compiled_once_for_all_adapters(folder):
    bank, inputs, graphs = bank_of(folder), tokens(3), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    bank.model.config.use_cache = False
    model = torch.compile(bank.model, backend=count, fullgraph=True)
    with torch.no_grad():
        for ids in (["a", "b", None], ["d", "d", "c"], ["c", None, "a"]):
            with bank.batch(ids):
                outputs = model(inputs).logits
            for i, name in enumerate(ids):
                close(outputs[i], alone(folder, name)(inputs[i : i + 1]).logits[0])
        assert len(graphs) == 1
        for name in ("a", None, "b"):
            bank.activate(name)
            close(model(inputs).logits, alone(folder, name)(inputs).logits)
        assert len(graphs) == 2  # with a batch, and without
    torch._dynamo.reset()


def test_threads_keep_their_own_adapters(folder):
    """Batches side by side, while another thread switches and puts back."""
    bank, inputs, failed = bank_of(folder), tokens(1), []
    expected = {name: alone(folder, name)(inputs).logits.detach() for name in [*TARGETS, None]}

    def batches(name):
        for _ in range(8):
            with torch.no_grad(), bank.batch([name]):
                check(name)

    def switches():
        for name in ["a", "b", "c", "d"] * 2:
            with torch.no_grad(), bank.using(name):
                check(name)

    def check(name):
        try:
            close(bank.model(inputs).logits, expected[name])
        except AssertionError as error:
            failed.append((name, error))

    threads = [threading.Thread(target=batches, args=(name,)) for name in [*TARGETS, None]]
    threads += [threading.Thread(target=switches) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failed and not any(t.is_alive() for t in threads)
    assert same(weights(bank.model), weights(alone(folder, None)))


@given(st.data())
def test_products_of_blocks_are_those_of_copies_of_the_deltas(data):
    """Any ids, ranks, block sizes and lengths: decode, prefill and the form with gradients."""
    k, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    m = data.draw(st.sampled_from([1, 7, 32, 96, 256]))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=7)))
    contracts = data.draw(st.booleans())
    ranks = [0, *data.draw(st.lists(st.integers(1, k), min_size=4, max_size=4))]
    random = torch.Generator().manual_seed(100 * k + m)
    delta = torch.randn(5, k, m, generator=random, dtype=torch.float64)
    delta[0] = 0
    if contracts:
        delta[torch.arange(k) >= torch.tensor(ranks)[:, None]] = 0
    x = torch.randn(len(ids), length, k, generator=random, dtype=torch.float64)
    expected = x @ delta[ids]
    picked = Stack.of(contracts, torch.zeros(5, k, dtype=torch.int64), delta, ranks).picked(ids, {})
    atol = k * 2.0**-52 * 6**2  # sums of k products of normal numbers, which stay below 6
    torch.use_deterministic_algorithms(True)  # fills memory that nothing was written to with NaN
    try:
        torch.testing.assert_close(picked._product(x), expected, rtol=0, atol=atol)
        with torch.no_grad():
            torch.testing.assert_close(picked._product(x), expected, rtol=0, atol=atol)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("contracts", [True, False])
def test_rows_that_a_model_flattens_with_their_tokens_are_tokens(contracts):
    """Many rows for each id are one product with its delta, not one each."""
    k, m = 6, 64
    delta, index = torch.randn(3, k, m), torch.stack([torch.randperm(64)[: k if contracts else m] for _ in range(3)])
    delta[0] = 0
    picked = Stack.of(contracts, index, delta, [0, k, k]).picked(torch.tensor([2, 0, 1]), {})
    x, y = torch.randn(3, 5, 64 if contracts else k), torch.randn(3, 5, 64)
    with torch.no_grad():
        assert torch.equal(picked.add(x.flatten(0, 1), y.flatten(0, 1)), picked.add(x, y).flatten(0, 1))


def test_what_an_adapter_has_too_few_of_is_not_read():
    """Shorter adapters sum row 0 of the stack again and again, whatever lies in their padding."""
    delta = torch.randn(3, 4, 64)
    delta[0] = 0
    stack = Stack.of(True, torch.zeros(3, 4, dtype=torch.int64), delta, [0, 1, 3])
    stack.delta[1, :, 1:], stack.delta[2, :, 3:] = float("nan"), float("nan")
    with torch.no_grad():
        assert stack.picked(torch.tensor([0, 1, 2]), {})._product(torch.ones(3, 1, 4)).isfinite().all()


def test_the_operator_is_what_it_says_to_dynamo():
    torch.library.opcheck(
        products_by_id,
        (torch.randn(3, 2, 4), torch.randn(3, 2, 4, 5), torch.tensor([2, 0, 1])),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_batch_has_gradients_where_they_are_enabled(folder):
    """And its outputs are those of the operator that has none."""
    bank, inputs, ids = bank_of(folder), tokens(3), ["a", "d", "b"]
    with bank.batch(ids):
        outputs = bank.model(inputs).logits
        with torch.no_grad():
            close(bank.model(inputs).logits, outputs.detach())
    (gradient,) = torch.autograd.grad(outputs.square().sum(), bank.model.model.embed_tokens.weight)
    expected = torch.zeros_like(gradient)
    for i, name in enumerate(ids):
        model = alone(folder, name)
        loss = model(inputs[i : i + 1]).logits.square().sum()
        expected += torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    close(gradient, expected)


# --- refusals ---------------------------------------------------------------------------------------------


def test_calls_that_do_not_fit_are_refused_and_change_nothing(folder, tmp_path):
    bank = bank_of(folder)
    bank.activate("a")
    before = weights(bank.model)
    with pytest.raises(AdapterError, match="'a' already"):
        bank.add("a", folder / "b")
    with pytest.raises(AdapterError, match="not an adapter"):
        bank.add("e", tmp_path)
    with pytest.raises(AdapterError, match="no adapter 'x'; there are: 'a', 'b', 'c', 'd'"):
        bank.activate("x")
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        bank.fuse({"a": 1.0, "x": 1.0})
    for wrong in ({"a": float("nan")}, {"a": "1"}, {"a": 10**400}, ["a"]):
        with pytest.raises(AdapterError, match="finite numbers"):
            bank.fuse(wrong)
    with pytest.raises(AdapterError, match="the sum is not finite in model.layers.0"):
        bank.fuse({"a": 1e300})
    for wrong in (None, "", 3):
        with pytest.raises(AdapterError, match="name is a text"):
            bank.add(wrong, folder / "b")
    for wrong in ("a", [], [0], [["a"]], None):
        with pytest.raises(AdapterError, match="a name or None for each row"), bank.batch(wrong):
            pytest.fail("the block must not run")
    for wrong in ([1], [1, 0], [2, 3, 4]):
        with pytest.raises(AdapterError, match="positive length each, 2 in all"), bank.batch(["b", "c"], wrong):
            pytest.fail("the block must not run")
    with pytest.raises(StateError, match="a is active"), bank.batch(["b"]):
        pytest.fail("the block must not run")
    assert same(weights(bank.model), before) and bank.active == ("a",)
    bank.remove("a")
    assert same(weights(bank.model), weights(alone(folder, None))) and bank.names == ("b", "c", "d")
    with pytest.raises(AdapterError, match="no adapter 'a'"), bank.batch(["a"]):
        pytest.fail("the block must not run")
    with bank.batch(["b", "c"]):
        with pytest.raises(StateError, match="inside a batch"):
            bank.activate("b")
        with pytest.raises(StateError, match="batch inside another"), bank.batch(["c"]):
            pytest.fail("the block must not run")
        with pytest.raises(StateError, match="2 adapters, and 3 rows"):
            bank.model(tokens(3))
    with bank.batch(["b", "c"], [2, 3]), pytest.raises(StateError, match="5 tokens, and 8 rows"):
        bank.model(tokens(1))
    bank.activate("b")  # nothing is left locked


def test_an_adapter_of_another_base_and_a_prepared_model_are_refused(folder):
    other = AdapterBank(hf("llama", hidden_size=32))
    with pytest.raises(AdapterError, match="another base"):
        other.add("a", folder / "a")
    assert other.names == ()
    model = hf("llama")
    s2ft.prepare(model, {"input_ids": tokens()}, s2ft.S2FTConfig(targets={"ffn.out": 2}))
    with pytest.raises(StateError, match="prepared"):
        AdapterBank(model)


def test_weights_that_no_linear_layer_holds_are_switched_but_not_batched(tmp_path):
    base = hf("llama")
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.model.embed_tokens.weight[3:5] += 1
    s2ft.exporters.extract(base, changed, tmp_path / "a")
    bank = AdapterBank(base)
    bank.add("a", tmp_path / "a")
    bank.activate("a")
    assert same(weights(base), weights(changed))
    bank.activate(None)
    with pytest.raises(ExportError, match="embed_tokens.weight cannot be in a batch: .*Embedding"), bank.batch(["a"]):
        pytest.fail("the block must not run")
