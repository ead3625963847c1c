"""`s2ft train`: stopped in any way it goes on to the same bits, and whatever stops it says so in one line."""

import json
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_cli import base, invoke, lines, refused, text  # noqa: F401  (fixtures)

from s2ft_compile.cli import fit
from s2ft_compile.cli import train as module
from s2ft_compile.cli.options import check_begun, check_new
from s2ft_compile.errors import ConfigError
from s2ft_compile.exporters.files import MINE

STEPS = 6


def options(base, text, output, **changes):  # noqa: F811
    given = {
        "model": base,
        "data": text,
        "output": output,
        "targets": "ffn.out=3,attention.out=1",
        "steps": STEPS,
        "batch-size": 2,
        "seq-len": 16,
        "inner": "eager",
        "save-every": 2,
        "keep": 3,
        **changes,
    }
    return [piece for name, value in given.items() for piece in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(base, text, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("whole") / "run"
    result = invoke("train", *options(base, text, output))
    assert result.exit_code == 0, result.output
    return output


def deltas(run) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def log(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def at_step(step, action):
    """What is called for the log of every step, once `step` is there."""
    seen = []

    def memory():
        seen.append(1)
        if len(seen) == step:
            action()
        return {}

    return memory


def fail(error):
    raise error


STOPS = {
    "interrupted": (lambda: signal.raise_signal(signal.SIGINT), 3, "stopped; .*checkpoint-4 is complete"),
    "terminated": (lambda: signal.raise_signal(signal.SIGTERM), 4, "stopped; .*checkpoint-5 is complete"),
    "out of memory": (
        lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
        5,
        "out of memory: use a smaller batch.*checkpoint-4 is complete",
    ),
    "full disk": (lambda: fail(OSError(28, "No space left on device")), 5, "could not write: .*No space left.*4 is"),
}


SLOW = ("terminated", "out of memory")  # the same roads as the other two


@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.slow] * (how in SLOW)) for how in STOPS])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole, base, text, tmp_path, monkeypatch, how):  # noqa: F811
    action, step, message = STOPS[how]
    with monkeypatch.context() as patched:
        patched.setattr(fit, "_memory", at_step(step, action))
        said = invoke("train", *options(base, text, tmp_path / "run"))
    assert said.exit_code == 1
    (line,) = [line for line in said.output.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "adapter").exists()
    (tmp_path / "run" / "checkpoints" / "checkpoint-99").mkdir()  # one that was cut off while it was written
    again = invoke("train", "--resume", "--output", tmp_path / "run")
    assert again.exit_code == 0, again.output
    expected, resumed = deltas(whole), deltas(tmp_path / "run")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected) and resumed.keys() == expected.keys()
    kept = [{k: entry[k] for k in ("step", "loss", "lr", "grad_norm")} for entry in log(tmp_path / "run")]
    assert kept == [{k: entry[k] for k in ("step", "loss", "lr", "grad_norm")} for entry in log(whole)]
    cards = [(run / "adapter" / "README.md").read_text() for run in (whole, tmp_path / "run")]
    assert cards[0] == cards[1] and f"| steps | {STEPS} of" in cards[0], "the whole run's, wherever it was stopped"


def test_a_file_that_torch_could_not_write_whole_is_a_full_disk():
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278\nmore")
    assert re.search(
        r"could not write \(is the disk full\?\): .*8278; run/c is", str(module._as_one_line(error, "run/c"))
    )


def test_a_run_that_was_cut_off_behind_its_last_step_takes_no_other(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "merged")
    result = invoke("train", "--resume", "--output", run)
    assert result.exit_code == 0, result.output
    assert log(run) == log(whole) and json.loads((run / "metrics.json").read_text())["steps"] == STEPS
    assert all(torch.equal(d, deltas(whole)[name]) for name, d in deltas(run).items()) and (run / "merged").exists()


def test_a_run_that_was_killed_before_it_had_slices_goes_on(whole, base, text, tmp_path, monkeypatch):  # noqa: F811
    """With what its folder held at that moment, `--resume` is enough."""
    killed = tmp_path / "killed"

    def kill(*_, **__):
        shutil.copytree(tmp_path / "run", killed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_remember", kill)
        assert "stopped, before there was a checkpoint" in refused("train", *options(base, text, tmp_path / "run"))
    assert "holds a run already: go on with --resume" in refused("train", *options(base, text, killed))
    result = invoke("train", "--resume", "--output", killed)
    assert result.exit_code == 0, result.output
    assert all(torch.equal(d, deltas(whole)[name]) for name, d in deltas(killed).items())
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_what_a_run_left_that_was_killed_as_it_began_is_not_in_the_way(tmp_path):
    (left := tmp_path / f"{MINE}0123.tmp").mkdir()
    with pytest.raises(ConfigError, match="no run to go on with: run.json is missing; start it without --resume"):
        check_begun(tmp_path)
    check_new(tmp_path)
    assert not left.exists()


def test_the_log_has_every_step(whole):
    entries = log(whole)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert all(entry["tokens_per_second"] > 0 and entry["memory"] > 1 << 20 for entry in entries)
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    size = sum(f.stat().st_size for f in (whole / "checkpoints" / "checkpoint-6").glob("model*"))
    assert size < 0.2 * (whole / "merged" / "model.safetensors").stat().st_size, "the slices alone"


def test_the_card_tells_of_the_run(whole, tmp_path):
    from types import SimpleNamespace

    card = (whole / "adapter" / "README.md").read_text()
    metrics = json.loads((whole / "metrics.json").read_text())
    assert f"| held-out loss | {metrics['loss_before']:.4f} before, {metrics['loss_after']:.4f} after |" in card
    rate = max(entry["lr"] for entry in log(whole))
    assert f"| rate | {rate:g}, cosine, weight decay 0 |" in card
    assert "base_model:" not in card, "a folder is nobody else's"
    shutil.copyfile(whole / "adapter" / "README.md", tmp_path / "README.md")
    given = SimpleNamespace(model="owner/name", data="d.jsonl", lr=1e-3, schedule="linear", weight_decay=0.1)
    module.describe(tmp_path / "README.md", given, metrics, "abc")
    front = (tmp_path / "README.md").read_text().split("---")[1]
    assert "base_model: owner/name\n" in front and "revision abc" in (tmp_path / "README.md").read_text()


def test_before_there_is_a_checkpoint_nothing_is_left(base, text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fit, "_memory", at_step(1, lambda: fail(MemoryError())))
    result = invoke("train", *options(base, text, tmp_path / "deep" / "run"))
    assert "error: out of memory" in result.output and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["a CPU's allocator", "a reporter"])
def test_the_first_step_fails_in_one_line(base, text, tmp_path, monkeypatch, how):  # noqa: F811
    from transformers import Trainer

    class UsageError(Exception):
        """As wandb raises it without an account."""

    UsageError.__module__ = "tensorboard.errors"
    steps = {
        "a CPU's allocator": lambda *_, **__: torch.empty(1 << 50),
        "a reporter": lambda *_, **__: fail(UsageError("No API key configured.")),
    }
    monkeypatch.setattr(Trainer, "training_step", steps[how])
    monkeypatch.setattr("s2ft_compile.cli.options.find_spec", lambda name: name)
    given = options(base, text, tmp_path / "run") + ["--report-to", "tensorboard"] * (how == "a reporter")
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [])
    (said,) = [line for line in invoke("train", *given).output.splitlines() if line.startswith("error: ")]
    expected = {"a CPU's allocator": "out of memory: use a", "a reporter": "--report-to tensorboard: No API key"}
    assert expected[how] in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_not_kept(base, text, tmp_path, monkeypatch):  # noqa: F811
    from transformers import Trainer

    step = Trainer.training_step

    def poisoned(self, model, *arguments, **given):
        loss = step(self, model, *arguments, **given)
        if self.state.global_step == 3:  # the fourth
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    result = invoke("train", *options(base, text, tmp_path / "run"))
    assert "the gradient of step 4 is nan: training diverged" in result.output
    assert "checkpoint-2 is complete" in result.output.replace("\n", "")


def test_only_what_a_run_was_begun_with_goes_on(whole, base, text, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert "holds a run already: go on with --resume" in refused("train", *options(base, text, run))
    for given in (options(base, text, tmp_path / "none"), ("--output", tmp_path / "none")):
        assert "has no run to go on with" in refused("train", "--resume", *given)
    again = ("train", "--resume", "--output", run)
    assert "begun with other slices" in refused(*again, "--targets", "ffn.out=4")
    assert "begun with other batches" in refused(*again, "--batch-size", 3)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    moved = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        moved.lm_head.weight.add_(1)
    for part in (moved, AutoTokenizer.from_pretrained(base)):
        part.save_pretrained(tmp_path / "moved")
    assert "of another base model" in refused(*again, "--model", tmp_path / "moved")
    other = lines(tmp_path / "other.jsonl", *[{"text": "something else entirely " * 40}] * 4)
    assert "begun with other data" in refused(*again, "--data", other)
    (run / "checkpoints" / "checkpoint-6" / "model.safetensors").write_bytes(b"\0" * 64)
    said = " ".join(invoke(*again).output.split())
    assert "checkpoint-6 is damaged" in said and "go on with --resume" not in said
    assert deltas(run).keys() == deltas(whole).keys(), "nothing was lost"


def test_a_file_of_options_and_what_is_typed_wins(base, text, tmp_path):  # noqa: F811
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {base}\ndata: {text}\ntargets:\n  ffn.out: 3\nseq-len: 16\nsteps: 9\nlr: 0.01\ninner: eager\n"
    )
    result = invoke("train", "--config", file, "--output", tmp_path / "run", "--steps", 1, "--held-out", 0)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["options"]["lr"] == 0.01 and metrics["steps"] == 1 and metrics["held_out_blocks"] == 0
    file.write_text("model: x\nlearning-rate: 3\n")
    assert "unknown option 'learning-rate'; valid: " in refused("train", "--config", file)
    file.write_text("steps: many\n")
    assert "steps is 'many'" in refused("train", "--config", file)
    file.write_text("- a\n")
    assert "is no map of options" in refused("train", "--config", file)
    assert "--model, --data, --output is missing" in refused("train")


@pytest.mark.parametrize("stopped", [False, True])
def test_early_stopping_ends_with_the_best(base, text, tmp_path, monkeypatch, stopped):  # noqa: F811
    """Also where the run was stopped after the first evaluation that was no better, and went on from another folder;
    and where it is asked to go on at its end."""
    before = [9.0] * stopped
    losses = iter([9.0, 5.0, 4.0, 3.0, 3.5, *before, 3.0, 1.0, *before, 1.0])  # before, after each step, after all
    monkeypatch.chdir(tmp_path)
    for place in (module, fit):
        monkeypatch.setattr(place, "loss", lambda *_, **__: next(losses))
    given = (*options(base, text, "run", steps=40), "--eval-every", 1, "--patience", 2)
    if stopped:
        with monkeypatch.context() as patched:
            patched.setattr(fit, "_memory", at_step(3, lambda: signal.raise_signal(signal.SIGINT)))
            assert "stopped; " in invoke("train", *given).output
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        given = ("--resume", "--output", "../run")
    for _ in range(1 + stopped):
        result = invoke("train", *given)
        assert result.exit_code == 0, result.output
    entries = log(tmp_path / "run")
    assert [entry["eval_loss"] for entry in entries if "eval_loss" in entry] == [5.0, 4.0, 3.0, 3.5, 3.0]
    best = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-3" / "model.safetensors")
    trained = by_parameter(deltas(tmp_path / "run"))
    assert all(torch.equal(best[f"{n}_delta"].flatten().sort()[0], d.flatten().sort()[0]) for n, d in trained)


def by_parameter(tensors):
    return [(name.removesuffix(".delta"), d) for name, d in tensors.items() if name.endswith(".delta")]


def test_options_of_the_schedule(base, text, tmp_path):  # noqa: F811
    given = options(base, text, tmp_path / "run", steps=8, schedule="constant_with_warmup", warmup=0.5, lr=1e-2)
    assert invoke("train", *given).exit_code == 0
    assert [entry["lr"] for entry in log(tmp_path / "run")] == pytest.approx([0, 0.0025, 0.005, 0.0075] + [0.01] * 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"patience": 2}, "it needs eval_every"),
        ({"eval-every": 2, "held-out": 0}, "held_out is 0"),
        ({"report-to": "mlflow"}, "unknown report_to 'mlflow'"),
        ({"report-to": "wandb"}, "needs the package: pip install wandb"),
        ({"epochs": 0}, "epochs is a positive number"),
        ({"clip": -1}, "clip is a number from 0"),
    ],
)
def test_refusals(base, text, tmp_path, change, message):  # noqa: F811
    assert message in refused("train", *options(base, text, tmp_path / "run", **change))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_does_not_fall_is_told():
    noisy = [5 + 0.1 * (-1) ** i for i in range(100)]
    assert "a learning rate of 1e-05 may be too low" in fit.hardly_learns(noisy, 1e-5)
    assert fit.hardly_learns([loss - 0.01 * i for i, loss in enumerate(noisy)], 1e-3) is None


def test_a_run_that_was_stopped_goes_on_with_the_units_it_had(base, text, tmp_path, monkeypatch):  # noqa: F811
    """Stopped in the third of three selections; its adapter has the units of all of them."""
    every = {"reselect-every": 2}
    result = invoke("train", *options(base, text, tmp_path / "whole", **every))
    assert result.exit_code == 0, result.output
    with monkeypatch.context() as patched:
        patched.setattr(fit, "_memory", at_step(4, lambda: signal.raise_signal(signal.SIGINT)))
        assert "checkpoint-5 is complete" in invoke("train", *options(base, text, tmp_path / "run", **every)).output
    again = invoke("train", "--resume", "--output", tmp_path / "run")
    assert again.exit_code == 0, again.output
    expected, result = deltas(tmp_path / "whole"), deltas(tmp_path / "run")
    assert expected.keys() == result.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    down = next(t for name, t in expected.items() if "down_proj" in name and t.is_floating_point())
    assert 3 < min(down.shape), "more channels than train at a time"


def test_the_command_refuses_what_cannot_be_chosen_anew(base, text, tmp_path):  # noqa: F811
    for given_options, message in (
        ({"reselect-every": -1}, "a share, or 0"),
        ({"reselect-every": 0.5, "budget": "model"}, "budget='layer'"),
    ):
        assert message in refused("train", *options(base, text, tmp_path / "run", **given_options))
