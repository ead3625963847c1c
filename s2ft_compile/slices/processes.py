"""Training in several processes (torch.distributed): what all of them have to agree on, and what is refused."""

import hashlib
import json

import torch.distributed as dist
from torch import Tensor, nn

from s2ft_compile.errors import StateError
from s2ft_compile.plan import Plan


def check_not_sharded(model: nn.Module) -> None:
    """Raises `StateError` for a model whose parameters are shards already."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise StateError(
                f"{name} is a shard of a weight ({parameter.placements}): call s2ft.prepare before fully_shard. Models "
                f"that are loaded tensor parallel (tp_plan) are not supported; load without it, and shard with FSDP2"
            )
        check_not_partitioned(name, parameter)


def check_not_partitioned(name: str, parameter: Tensor) -> None:
    """Raises `StateError` for a parameter that DeepSpeed has taken apart (ZeRO-3), which leaves it empty."""
    if hasattr(parameter, "ds_id"):
        raise StateError(
            f"{name} is partitioned by DeepSpeed's ZeRO-3, which is not supported: use FSDP2 (torch's fully_shard, or "
            f"accelerate with fsdp_version: 2)"
        )


def check_processes(plan: Plan, weight: Tensor) -> None:
    """That all processes of a sharded weight selected the same slices. Every one has to get here."""
    group = weight.device_mesh.get_group(0)
    digests: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest(plan), group=group)
    differ = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if differ:
        raise StateError(
            f"the processes selected other slices: {', '.join(map(str, differ))} not what 0 did. Prepare the same base "
            f"with the same configuration, seed and calibration batches in each, before fully_shard"
        )


def digest(plan: Plan) -> str:
    return hashlib.sha256(json.dumps(plan.to_dict()["slices"]).encode()).hexdigest()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def one_writes() -> str:
    """What else may be the matter with a file that is there already, where there are several processes."""
    return ". Where every process has the whole model (DDP), let the first alone write" if _several() else ""


def replacing() -> str:
    """What else may replace a weight in a training of several processes."""
    running = dist.is_available() and dist.is_initialized()
    return ". FSDP1 (FullyShardedDataParallel) replaces all weights: use FSDP2 (fully_shard)" if running else ""


def other_process() -> str:
    """What else may have happened to a weight where there are several processes."""
    if not _several():
        return ""
    return (
        ". Or the processes selected other slices, and DistributedDataParallel sent the first one's weights to all: "
        "prepare the same base with the same configuration, seed and calibration batches in each"
    )


def first_does(action, group=None) -> None:
    """Runs `action` in process 0, while the others wait; an error there is one in all of them."""
    failed: list = [None]
    if dist.get_rank(group) == 0:
        try:
            action()
        except Exception as error:
            failed = [error]
    dist.broadcast_object_list(failed, group=group, group_src=0)
    if failed[0] is not None:
        raise failed[0]
