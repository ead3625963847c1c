"""`save FOLDER` trains and saves in some processes, `load FOLDER` goes on in others, `killed FOLDER` loses one on its
way; the first process prints what it found."""

import copy
import json
import os
import signal
import sys
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import s2ft_compile as s2ft

TARGETS = {"ffn.out": 5, "ffn.in": 4, "attention.out": 1}
IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def plain(device="cpu"):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, use_cache=False)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).train()


@cache
def _prepared(seed, device):
    model = plain(device)
    s2ft.prepare(model, (IDS[:2].to(device),), s2ft.S2FTConfig(TARGETS, seed=seed), train=False)
    return model


def prepared(seed=0, device="cpu"):
    return copy.deepcopy(_prepared(seed, device))


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=layer is model.model.layers[0])
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model):
    return torch.optim.AdamW(s2ft.parameters(model), lr=1e-2, weight_decay=0.0)


def train(model, optimizer, steps, ids):
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def mine():
    return IDS.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensors):
    return [t.full_tensor() if hasattr(t, "placements") else t.detach() for t in tensors]


def difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def expected(steps):
    model = prepared()
    train(model, optimizer_of(model), steps, IDS)
    return model


def save(folder):
    one, measured = expected(2), {}
    ddp = torch.nn.parallel.DistributedDataParallel(prepared())
    sent = []

    def counted(group, bucket):
        sent.append(bucket.buffer().numel())
        reduced = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        return reduced.get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, counted)
    train(ddp, optimizer_of(ddp), 2, mine())
    measured["ddp"] = difference(s2ft.parameters(ddp), s2ft.parameters(one))
    measured["sent"], measured["deltas"] = sum(sent), 2 * sum(p.numel() for p in s2ft.parameters(one))

    model = shard(prepared())
    optimizer = optimizer_of(model)
    train(model, optimizer, 2, mine())
    measured["fsdp"] = difference(whole(s2ft.parameters(model)), s2ft.parameters(one))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "state")
    s2ft.exporters.save_adapter(model, folder / "adapter")
    s2ft.exporters.save_merged(model, folder / "merged")
    try:
        s2ft.exporters.save_adapter(model, folder / "adapter")
    except s2ft.ExportError as error:  # in every process, none of which waits for another
        measured["exists"] = str(error)
    patched, own = plain(), {p.name: p for p in s2ft.patches(model)}
    for name, weight in patched.named_parameters():
        if name in own:
            own[name].apply(weight)
    with torch.no_grad():
        logits = s2ft.Reference(model)(IDS).logits
        measured["reference"] = (logits - plain().eval()(IDS).logits).abs().max().item()
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder / "merged")
        measured["merged"] = (model.eval()(IDS).logits - loaded(IDS).logits).abs().max().item()
        by_adapter = plain()
        s2ft.exporters.load_adapter(by_adapter, folder / "adapter")
        measured["adapter"] = difference(by_adapter.parameters(), loaded.parameters())
        measured["patches"] = difference(patched.parameters(), loaded.parameters())
    return measured


def load(folder):
    one, measured = expected(3), {}
    model = shard(prepared())
    optimizer = optimizer_of(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "state")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, 1, mine())
    measured["resumed"] = difference(whole(s2ft.parameters(model)), s2ft.parameters(one))

    first = prepared() if dist.get_rank() == 0 else None  # no other process ever holds the model
    model = shard(prepared(device="meta"))
    model.to_empty(device="cpu")
    for rotary in [m for m in model.modules() if hasattr(m, "original_inv_freq")]:
        rotary.__init__(model.config)  # whose buffers are in no state_dict
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, first.state_dict() if first else {}, options=options)
    train(model, optimizer_of(model), 3, mine())
    measured["meta"] = difference(whole(s2ft.parameters(model)), s2ft.parameters(one))
    s2ft.exporters.save_adapter(model, folder / "adapter_meta")
    if first:
        s2ft.exporters.load_adapter(first, folder / "adapter_meta")
        measured["meta adapter"] = difference(s2ft.parameters(first), s2ft.parameters(one))

    model = shard(prepared(seed=dist.get_rank()))
    measured["other"] = refusal(lambda: train(model, optimizer_of(model), 1, mine()))
    model = plain()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh))
    measured["sharded"] = refusal(lambda: s2ft.prepare(model, (IDS,)))
    return measured


def killed(folder):
    """Three steps with a checkpoint after each; the last process is killed once, before the third."""
    model = shard(prepared())
    optimizer = optimizer_of(model)
    begun = len(list(folder.glob("step-*/.metadata")))  # torch writes it last

    def state():
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    if begun:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder / f"step-{begun}")
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for step in range(begun, 3):
        if step == 2 and begun == 0 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, optimizer, 1, mine())
        dcp.save(state(), checkpoint_id=folder / f"step-{step + 1}")
    return {"begun": begun, "deltas": difference(whole(s2ft.parameters(model)), s2ft.parameters(expected(3)))}


def refusal(call):
    try:
        call()
    except s2ft.StateError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = {"save": save, "load": load, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
