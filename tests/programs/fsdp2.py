"""Two processes train a sharded model; process 0 prints how far they are from one process on the joined batch."""

import json
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import s2ft_compile as s2ft

CONFIG = s2ft.S2FTConfig({"ffn.out": 5, "ffn.in": 4, "attention.out": 1})
STEPS = 3


def prepared(ids):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    return model, s2ft.prepare(model, (ids[:2],), CONFIG)


def train(model, ids):
    """The losses of the steps, and the gradients of the first by name."""
    optimizer, losses, first = torch.optim.SGD(s2ft.parameters(model), lr=0.5), [], {}
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not step:
            first = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), first


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(0, 64, (2 * size, 12), generator=torch.Generator().manual_seed(0))
    one, _ = prepared(ids)
    expected, gradients = train(one, ids)
    results = {}
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ways = {"eager": {}, "by layer": {}}
    if sys.argv[1:] == ["policies"]:
        ways = {"bfloat16": {"mp_policy": bf16}, "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}}
    for how, policy in ways.items():
        torch._dynamo.reset()
        model, _ = prepared(ids)
        if how != "eager":
            s2ft.compile_layers(model, inner="aot_eager")
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, **policy)
        fully_shard(model, mesh=mesh, **policy)
        losses, sharded = train(model, ids[2 * rank : 2 * rank + 2])
        dist.all_reduce(losses)
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        errors = [((sharded[n].full_tensor() - g).abs().max() / g.abs().max()).item() for n, g in gradients.items()]
        results[how] = {
            "gradients": sorted(sharded) == sorted(gradients) and max(errors),
            "losses": (losses / size - expected).abs().max().item(),
        }
        try:
            with s2ft.disabled(model):
                pass
        except s2ft.StateError as error:
            results[how]["refused"] = str(error)
        if rank == 0:
            again, _ = prepared(ids)
            again.load_state_dict(whole)
            pairs = zip(s2ft.parameters(again), s2ft.parameters(one))
            results[how]["deltas"] = max((a - b).abs().max().item() for a, b in pairs)
    if rank == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
