"""Distillation at a tiny size: what it writes, that it goes on exactly, and that how it is run changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from bksdm import checkpoint
from bksdm.errors import IncompatibleTeacher
from bksdm.variants import VARIANTS
from bksdm_training import fit, loop, progress
from bksdm_training.config import DistillConfig, LoopConfig
from bksdm_training.data import DataError
from bksdm_training.distill import distill
from bksdm_training.inputs import Inputs
from bksdm_training.losses import LossWeights
from bksdm_training.material import open_material
from bksdm_training.records import ResumeError

CONFIG = DistillConfig(
    size=64,
    loop=LoopConfig(steps=4, batch_size=4, learning_rate=1e-3, warmup=0, decay_share=0, checkpoint_every=2),
    shown=0,
)


class KilledError(Exception):
    pass


@pytest.fixture
def teacher(trained):
    return checkpoint.load(str(trained / "checkpoint"))


def _run(teacher, data, output, config=CONFIG, variant="small", accelerator=None):
    material = open_material(data, teacher, config)
    return distill(config, teacher, VARIANTS[variant], material, output, accelerator or Accelerator(cpu=True))


def _with(config=CONFIG, **changes):
    return replace(config, loop=replace(config.loop, **changes))


def _die_at(monkeypatch, step):
    original = loop._gradients

    def dying(model, loss_at, now, *rest):
        if now == step:
            raise KilledError
        return original(model, loss_at, now, *rest)

    monkeypatch.setattr(loop, "_gradients", dying)


def _log(output):
    return progress.read_log(output / "states")


def _newest(output):
    states = sorted((output / "states").glob("step-*"))
    return {
        f"{group}:{key}": value
        for group in ("weights", "ema", "optimizer")
        for key, value in load_file(states[-1] / f"{group}.safetensors").items()
    }


@pytest.mark.parametrize("variant", ["base", "small", "tiny"])
def test_a_run_ends_in_a_checkpoint_with_all_that_repeats_it(teacher, mini_data, tmp_path, variant):
    folder = _run(teacher, mini_data / "train", tmp_path, replace(CONFIG, shown=2), variant)
    student = checkpoint.load(str(folder))
    assert student.unet.config["layers_per_block"] == 1
    assert len(student.unet.down_blocks) == (3 if variant == "tiny" else 4)
    assert student.licence.notice.startswith(f"Changed: U-Net blocks were removed, as in {variant}, from checkpoint")
    assert "trained for 4 steps" in student.licence.notice
    assert "public domain" in student.licence.notice
    for name in ("samples.png", "loss.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 100, name
    facts = json.loads((tmp_path / "training.json").read_text())
    assert (facts["variant"], facts["config"]["size"], facts["skipped"]["skipped"]) == (variant, 64, 0)
    assert facts["data"]["name"] == "train"
    assert str(tmp_path) not in json.dumps(facts)
    terms = set(_log(tmp_path)[0]) - {"step"}
    assert terms == {"task", "output", *(f"feature_{i}" for i in range(6 if variant == "tiny" else 8))}


def test_every_state_holds_a_checkpoint_and_only_the_last_are_kept(teacher, mini_data, tmp_path):
    _run(teacher, mini_data / "train", tmp_path, replace(_with(steps=6), shown=2))
    states = sorted((tmp_path / "states").glob("step-*"))
    assert [state.name for state in states] == ["step-00000004", "step-00000006"]
    for state in states:
        loaded = checkpoint.load(str(state / "checkpoint"))
        average = load_file(state / "ema.safetensors")
        for key, value in loaded.unet.state_dict().items():
            torch.testing.assert_close(value, average[f"unet.{key}"], rtol=1e-3, atol=1e-6)  # stored in half precision
        assert (state / "samples.png").is_file()


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(teacher, mini_data, tmp_path, monkeypatch):
    _run(teacher, mini_data / "train", tmp_path / "whole", _with(steps=6))
    for step in (2, 4, 6):
        _die_at(monkeypatch, step)
        with pytest.raises(KilledError):
            _run(teacher, mini_data / "train", tmp_path / "broken", _with(steps=6))
        monkeypatch.undo()
    _run(teacher, mini_data / "train", tmp_path / "broken", _with(steps=6))
    assert _log(tmp_path / "whole") == _log(tmp_path / "broken")
    whole, broken = _newest(tmp_path / "whole"), _newest(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    for key, value in whole.items():
        assert torch.equal(value, broken[key]), key


def _micro(config):
    return replace(config, micro_batch=1)


def _recomputed(config):
    return replace(config, gradient_checkpointing=True)


def _with_worker(config):
    return replace(config, workers=1)


# Largest relative difference of any term, before the first update and over eight steps. Measured: micro-batches 3.2e-7
# and 1.2e-5 to 1.5e-4 by processor and torch (Adam makes a whole step of a near-zero gradient's rounding), others 0.
@pytest.mark.parametrize(
    ("change", "first", "limit"), [(_micro, 5e-6, 1e-3), (_recomputed, 0.0, 1e-6), (_with_worker, 0.0, 0.0)]
)
def test_how_a_run_is_computed_changes_no_loss(teacher, mini_data, tmp_path, change, first, limit):
    config = _with(steps=8, checkpoint_every=8)
    for variant in ("small", "tiny"):
        _run(teacher, mini_data / "train", tmp_path / variant / "a", config, variant)
        _run(teacher, mini_data / "train", tmp_path / variant / "b", change(config), variant)
        one, other = _log(tmp_path / variant / "a"), _log(tmp_path / variant / "b")
        assert _difference(one[:1], other[:1]) <= first
        assert _difference(one, other) <= limit


def _difference(a, b):
    assert [row.keys() for row in a] == [row.keys() for row in b]
    return max(abs(x[key] - y[key]) / abs(x[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_the_settings_that_only_change_speed_may_change_between_calls(teacher, mini_data, tmp_path):
    _run(teacher, mini_data / "train", tmp_path)
    config = replace(_with(steps=6, checkpoint_every=3, keep=1), micro_batch=2, gradient_checkpointing=True, shown=1)
    _run(teacher, mini_data / "train", tmp_path, config)
    assert [row["step"] for row in _log(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": _with(learning_rate=2e-3)}, "settings"),
        ({"config": replace(CONFIG, weights=LossWeights(feature=2.0))}, "settings"),
        ({"variant": "base"}, "--variant"),
    ],
)
def test_going_on_with_something_else_is_refused(teacher, mini_data, tmp_path, change, said):
    _run(teacher, mini_data / "train", tmp_path)
    before = (tmp_path / "training.json").read_bytes()
    with pytest.raises(ResumeError, match=f"begun with other {said}"):
        _run(teacher, mini_data / "train", tmp_path, **change)
    assert (tmp_path / "training.json").read_bytes() == before


def test_another_teacher_or_data_is_refused(teacher, mini_data, tmp_path):
    _run(teacher, mini_data / "train", tmp_path)
    with pytest.raises(ResumeError, match="begun with other data"):
        _run(teacher, mini_data / "unseen", tmp_path)
    with torch.no_grad():
        teacher.unet.conv_out.bias.add_(1)
    with pytest.raises(ResumeError, match="begun with other teacher"):
        _run(teacher, mini_data / "train", tmp_path)


def test_task_alone_needs_no_teacher(teacher, mini_data, tmp_path, monkeypatch):
    calls = []
    original = UNet2DConditionModel.forward

    def counting(self, *args, **kwargs):
        calls.append(self is teacher.unet)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    config = replace(CONFIG, weights=LossWeights(output=0.0, feature=0.0))
    _run(teacher, mini_data / "train", tmp_path, config)
    assert calls == [False] * 4
    assert set(_log(tmp_path)[0]) == {"step", "task"}


def test_a_student_starts_from_its_teacher_or_from_nothing(teacher, mini_data, tmp_path):
    still = _with(steps=1, learning_rate=0.0)
    copied = checkpoint.load(str(_run(teacher, mini_data / "train", tmp_path / "a", still)))
    drawn = checkpoint.load(str(_run(teacher, mini_data / "train", tmp_path / "b", replace(still, start="random"))))
    own = teacher.unet.conv_in.weight
    torch.testing.assert_close(copied.unet.conv_in.weight, own, rtol=1e-3, atol=1e-6)
    assert (drawn.unet.conv_in.weight - own).abs().mean() > 0.01


def test_a_student_comes_nearer_to_its_teacher(teacher, mini_data, tmp_path):
    config = _with(steps=60, batch_size=8, checkpoint_every=60, ema_decay=0.9)
    _run(teacher, mini_data / "train", tmp_path, config)
    rows = [progress.summed(row) for row in _log(tmp_path)]
    first, last = rows[:10], rows[-10:]
    for term, share in (("output", 0.9), ("feature", 0.7)):  # measured 0.83 and less
        assert sum(row[term] for row in last) < share * sum(row[term] for row in first), term


def test_velocity_is_learnt_where_the_teacher_predicts_it(teacher, mini_data, tmp_path):
    teacher = replace(teacher, scheduler_config={**teacher.scheduler_config, "prediction_type": "v_prediction"})
    material = open_material(mini_data / "train", teacher, CONFIG)
    batch = material.examples[5]
    noisy, timesteps, _, target = Inputs(teacher, torch.device("cpu"))(batch)
    plain = replace(teacher, scheduler_config={**teacher.scheduler_config, "prediction_type": "epsilon"})
    *_, noise = Inputs(plain, torch.device("cpu"))(batch)
    assert torch.equal(noise, batch.noise)
    # x_t = a x_0 + s e and v = a e - s x_0, so a x_t - s v = x_0 and s x_t + a v = e (arXiv 2202.00512)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[timesteps]
    again = (1 - alpha).sqrt() * noisy.double() + alpha.sqrt() * target.double()
    torch.testing.assert_close(again, noise.double(), rtol=0, atol=4e-5)  # measured 7.9e-6, worst of 20
    _run(teacher, mini_data / "train", tmp_path)
    saved = json.loads((tmp_path / "checkpoint" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"


def test_a_v2_student_is_called_one(teacher, mini_data, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**teacher.unet.config, "use_linear_projection": True})
    made = _run(replace(teacher, unet=unet), mini_data / "train", tmp_path, variant="v2-tiny")
    assert "as in v2-tiny" in checkpoint.load(str(made)).licence.notice
    with pytest.raises(IncompatibleTeacher, match="use --variant tiny"):
        _run(teacher, mini_data / "train", tmp_path / "v1", variant="v2-tiny")


def test_broken_pictures_are_skipped_and_counted(teacher, mini_data, tmp_path, caplog):
    data = shutil.copytree(mini_data, tmp_path / "data")
    (data / "train" / "3.png").write_bytes(b"cut")
    _run(teacher, data / "train", tmp_path / "run", replace(CONFIG, skip_limit=0.5))
    facts = json.loads((tmp_path / "run" / "training.json").read_text())
    assert facts["skipped"]["skipped"] >= 1
    assert "skipped '3.png'" in caplog.text


def test_a_finished_run_is_left_as_it_is(teacher, mini_data, tmp_path):
    _run(teacher, mini_data / "train", tmp_path)
    record = (tmp_path / "training.json").read_bytes()
    again = _run(teacher, mini_data / "train", tmp_path, replace(CONFIG, micro_batch=1))
    assert again == tmp_path / "checkpoint"
    assert (tmp_path / "training.json").read_bytes() == record


def test_another_precision_is_another_run(teacher, mini_data, tmp_path):
    _run(teacher, mini_data / "train", tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ResumeError, match="begun with other --mixed-precision"):
        _run(teacher, mini_data / "train", tmp_path, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))


def test_too_many_broken_pictures_end_the_run(teacher, mini_data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "CHECK_SKIPS_EVERY", 2)
    data = shutil.copytree(mini_data, tmp_path / "data")
    for i in range(6):
        (data / "train" / f"{i}.png").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"could not be used, more than 1\.00%"):
        _run(teacher, data / "train", tmp_path / "run")


def test_bf16_trains_float32_weights(teacher, mini_data, tmp_path):
    _run(teacher, mini_data / "train", tmp_path, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    state = _newest(tmp_path)
    assert {value.dtype for key, value in state.items() if key.startswith(("weights:", "ema:"))} == {torch.float32}
    exact = tmp_path / "exact"
    AcceleratorState._reset_state(reset_partial_state=True)
    _run(teacher, mini_data / "train", exact)
    worst = _difference(_log(exact), _log(tmp_path))

    assert worst < 0.3  # measured 0.10, of one feature term


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_run_on_cuda_ends_in_a_checkpoint_and_goes_on(teacher, mini_data, tmp_path, precision, recomputed):
    for steps in (4, 6):
        AcceleratorState._reset_state(reset_partial_state=True)  # the teacher was trained on the CPU
        config = replace(_with(steps=steps), shown=2, gradient_checkpointing=recomputed, workers=1)
        folder = _run(teacher, mini_data / "train", tmp_path, config, "tiny", Accelerator(mixed_precision=precision))
    assert [row["step"] for row in _log(tmp_path)] == list(range(1, 7))
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(str(folder)).unet.state_dict().values())
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["device"] == torch.cuda.get_device_name()
    assert facts["mixed_precision"] == precision


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
def test_cuda_has_the_losses_of_a_cpu(teacher, mini_data, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    _run(teacher, mini_data / "train", tmp_path / "cuda", accelerator=Accelerator())
    AcceleratorState._reset_state(reset_partial_state=True)
    _run(teacher, mini_data / "train", tmp_path / "cpu")
    assert _difference(_log(tmp_path / "cpu"), _log(tmp_path / "cuda")) < 0.02  # TF32 has ten bits; not run yet


_PROGRAM = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from bksdm import checkpoint
from bksdm.variants import VARIANTS
from bksdm_training.config import DistillConfig, LoopConfig
from bksdm_training.losses import LossWeights
from bksdm_training.distill import distill
from bksdm_training.material import open_material
config = {config!r}
teacher = checkpoint.load({teacher!r})
material = open_material(Path({data!r}), teacher, config)
distill(config, teacher, VARIANTS["small"], material, Path({output!r}), Accelerator(cpu=True))
"""


def _start(config, trained, data, output, processes=1):
    program = output.parent / "program.py"
    output.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(
        _PROGRAM.format(
            path=sys.path, config=config, teacher=str(trained / "checkpoint"), data=str(data), output=str(output)
        )
    )
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launch, str(program)], stderr=subprocess.DEVNULL, env=environment)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(trained, mini_data, tmp_path):
    config = _with(steps=24)
    assert _start(config, trained, mini_data / "train", tmp_path / "whole" / "run").wait() == 0
    output = tmp_path / "broken" / "run"
    for step in (3, 9, 16):
        process = _start(config, trained, mini_data / "train", output)
        log = output / "states" / "log.jsonl"
        while process.poll() is None and (not log.is_file() or log.read_bytes().count(b"\n") < step):
            time.sleep(0.005)
        assert process.poll() is None, f"the run ended before step {step}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = _start(config, trained, mini_data / "train", output)
    while process.poll() is None and not list((output / "states").glob(".writing-*/optimizer.safetensors")):
        time.sleep(0.0005)
    assert process.poll() is None, "the run ended before a state was caught half written"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((output / "states").glob(".writing-*"))
    assert _start(config, trained, mini_data / "train", output).wait() == 0
    assert not list((output / "states").glob(".writing-*"))
    whole, broken = _newest(tmp_path / "whole" / "run"), _newest(output)
    assert whole.keys() == broken.keys()
    for key, value in whole.items():
        assert torch.equal(value, broken[key]), key
    assert _log(tmp_path / "whole" / "run") == _log(output)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 1])  # one part a step, and two: gradients travel with the last
def test_two_processes_have_the_losses_of_one(trained, mini_data, tmp_path, micro):
    # At the published rate: at twenty times it the last digits of a step grow tenfold within a few more.
    config = replace(_with(steps=12, learning_rate=5e-5), micro_batch=micro)
    for processes in (1, 2):
        assert _start(config, trained, mini_data / "train", tmp_path / str(processes) / "run", processes).wait() == 0
    one, two = _log(tmp_path / "1" / "run"), _log(tmp_path / "2" / "run")
    assert len(one) == 12
    assert _difference(one[:1], two[:1]) < 5e-6  # before the first update; measured 9.0e-7
    assert _difference(one, two) < 2e-4  # measured 2.5e-5; micro-batches of one process, at this rate, up to 4.5e-5
    # a run begun by two processes goes on with two, and with one
    for steps, processes in ((14, 2), (16, 1)):
        longer = replace(config, loop=replace(config.loop, steps=steps))
        assert _start(longer, trained, mini_data / "train", tmp_path / "2" / "run", processes).wait() == 0
        assert len(_log(tmp_path / "2" / "run")) == steps
    facts = json.loads((tmp_path / "2" / "run" / "training.json").read_text())
    assert facts["skipped"]["seen"] == 16 * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of its imports and of looking at gradients
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_blocks_have_the_losses_of_plain_ones(teacher, mini_data, gradient_checkpointing, tmp_path):
    config = replace(_with(checkpoint_every=4), gradient_checkpointing=gradient_checkpointing)
    _run(teacher, mini_data / "train", tmp_path / "plain", config, "tiny")
    compiled = replace(config, compiled=True)
    _run(checkpoint_copy(teacher), mini_data / "train", tmp_path / "compiled", compiled, "tiny")
    worst = _difference(_log(tmp_path / "plain"), _log(tmp_path / "compiled"))
    assert worst < 4e-6  # measured 4.3e-7


def checkpoint_copy(teacher):
    unet = UNet2DConditionModel.from_config(teacher.unet.config)
    unet.load_state_dict(teacher.unet.state_dict())
    return replace(teacher, unet=unet.eval())
