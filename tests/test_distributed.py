"""Several processes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
ROOT = PROGRAMS.parent.parent


def run(program: str, processes: int = 2) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, PROGRAMS / program], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_fsdp2_trains_as_one_process_on_the_joined_batch():
    """float32: sums of a batch in another order, so a few units of roundoff, carried through three steps."""
    for how, found in run("fsdp2.py").items():
        assert 0 < found["gradients"] < 1e-5, (how, found)
        assert found["losses"] < 1e-5 and found["deltas"] < 1e-5, (how, found)
        assert "sharded (fully_shard)" in found["refused"]
