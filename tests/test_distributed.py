"""Several processes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
ROOT = PROGRAMS.parent.parent


def run(program: str, *arguments, processes: int = 2, fails: bool = False) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(PROGRAMS / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return {} if fails else json.loads(done.stdout.splitlines()[-1])


def test_fsdp2_trains_as_one_process_on_the_joined_batch():
    """float32: sums of a batch in another order, so a few units of roundoff, carried through three steps."""
    for how, result in run("fsdp2.py").items():
        assert 0 < result["gradients"] < 1e-5, (how, result)
        assert result["losses"] < 1e-5 and result["deltas"] < 1e-5, (how, result)
        assert "sharded (fully_shard)" in result["refused"]


@pytest.mark.slow
def test_fsdp2_with_mixed_precision_and_with_offloading():
    """bfloat16: gradients of sums of products that are rounded to eight bits, through two layers."""
    ways = run("fsdp2.py", "policies")
    assert ways["offloaded"]["gradients"] < 1e-5 and ways["offloaded"]["losses"] < 1e-5
    assert 1e-5 < ways["bfloat16"]["gradients"] < 2**-5 and ways["bfloat16"]["losses"] < 2**-8


@pytest.mark.slow
def test_two_processes_save_what_one_would_and_four_go_on(tmp_path):
    """AdamW divides a gradient by its own size, so a roundoff in one can move an entry by a part of its rate, 1e-2."""
    saved = run("many.py", "save", tmp_path)
    assert saved["ddp"] < 1e-4 and saved["fsdp"] < 1e-4
    assert saved["sent"] == saved["deltas"], "the numbers that DDP reduced in two steps are the deltas'"
    assert saved["reference"] < 1e-5, "the base's function, sharded"
    assert saved["merged"] < 1e-5, "what was saved computes what the sharded model does"
    assert saved["adapter"] == saved["patches"] == 0, "adapter, merged model and patches are of the same bits"
    assert "exists; name a folder" in saved["exists"]
    loaded = run("many.py", "load", tmp_path, processes=4)
    assert loaded["resumed"] < 1e-4, "torch.distributed.checkpoint of two processes, in four"
    assert loaded["meta"] < 1e-4 and loaded["meta adapter"] < 1e-4, "loaded by the first process alone"
    assert "the processes selected other slices: 1, 2, 3 not what 0 did" in loaded["other"]
    assert "is a shard of a weight" in loaded["sharded"] and "tensor parallel" in loaded["sharded"]


@pytest.mark.slow
def test_after_a_process_was_killed_all_go_on_from_the_last_checkpoint(tmp_path):
    run("many.py", "killed", tmp_path, fails=True)
    resumed = run("many.py", "killed", tmp_path)
    assert resumed["begun"] == 2 and resumed["deltas"] < 1e-4


@pytest.mark.slow
def test_a_rollout_engine_in_another_process_has_fresh_weights_after_every_step():
    result = run("rollout.py")
    assert result["same"] and result["bytes"] < 0.2 * result["merged"]
