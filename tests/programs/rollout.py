"""Process 0 trains; process 1 is a rollout engine with a plain model, which gets fresh weights after every step:
positions once, values from then on. Process 0 prints the bytes of a step, and whether they became the merged ones."""

import json

import torch
import torch.distributed as dist
from many import IDS, optimizer_of, plain, prepared, train

import s2ft_compile as s2ft

STEPS = 3


def main():
    dist.init_process_group("gloo")
    trainer = dist.get_rank() == 0
    model = prepared() if trainer else plain()
    optimizer = optimizer_of(model) if trainer else None
    weights = {} if trainer else dict(model.named_parameters())
    known, sent = [[(p.name, p.indices) for p in s2ft.patches(model)] if trainer else None], 0
    dist.broadcast_object_list(known)
    for _ in range(STEPS):
        if trainer:
            train(model, optimizer, 1, IDS)
        fresh = list(s2ft.patches(model)) if trainer else [None] * len(known[0])
        for (name, indices), patch in zip(known[0], fresh, strict=True):
            values = patch.values.contiguous() if patch else torch.empty(len(indices))
            dist.broadcast(values, 0)
            sent += values.nbytes
            if not trainer:
                weights[name].detach().view(-1)[indices.long()] = values
    if trainer:
        s2ft.release(model)
    same = True
    for weight in model.parameters():
        theirs = weight.detach().clone()
        dist.broadcast(theirs, 1)
        same &= torch.equal(theirs, weight)
    if trainer:
        whole = sum(p.nbytes for p in model.parameters())
        print(json.dumps({"same": same, "bytes": sent // STEPS, "merged": whole}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
