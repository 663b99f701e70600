import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bksdm_training import checkpointing
from bksdm_training.checkpointing import ResumeError, State


def _state(step: int) -> State:
    return State(step, {"weights": {"a": torch.full((3,), float(step))}}, {"stage": "vae"})


def test_the_newest_state_comes_back_whole(tmp_path):
    for step in (1, 2, 10):
        checkpointing.save(tmp_path, _state(step), keep=2)
    newest = checkpointing.load_newest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.facts) == (10, {"stage": "vae"})
    assert torch.equal(newest.groups["weights"]["a"], torch.full((3,), 10.0))


def test_only_the_last_few_are_kept(tmp_path):
    for step in range(1, 6):
        checkpointing.save(tmp_path, _state(step), keep=2)
    assert checkpointing.steps(tmp_path) == [4, 5]


def test_a_half_written_state_is_removed_and_the_one_before_it_used(tmp_path):
    checkpointing.save(tmp_path, _state(3))
    half = tmp_path / ".writing-killed"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"\x00" * 10)
    newest = checkpointing.load_newest(tmp_path)
    assert newest is not None
    assert newest.step == 3
    assert not half.exists()


def _cut(path):
    path.write_bytes(path.read_bytes()[:20])


def _say(path, text):
    path.write_text(text)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: _cut(state / "weights.safetensors"),
        lambda state: (state / "weights.safetensors").unlink(),
        lambda state: (state / "state.json").unlink(),
        lambda state: _say(state / "state.json", "{"),
        lambda state: _say(state / "state.json", "[1]"),
        lambda state: _say(state / "state.json", '{"groups": ["weights"]}'),
        lambda state: _say(state / "state.json", '{"step": 7, "groups": ["weights"]}'),
        lambda state: _say(state / "state.json", '{"step": 5}'),
    ],
)
def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path, spoil, caplog):
    for step in (3, 5):
        checkpointing.save(tmp_path, _state(step))
    spoil(tmp_path / "step-00000005")
    newest = checkpointing.load_newest(tmp_path)
    assert newest is not None
    assert newest.step == 3
    assert "step-00000005 is damaged" in caplog.text
    spoil(tmp_path / "step-00000003")
    with pytest.raises(ResumeError, match="every state"):
        checkpointing.load_newest(tmp_path)


def test_a_state_is_out_of_sight_before_its_files_go(tmp_path, monkeypatch):
    """A kill while an old state was being deleted left half a folder that counted as a whole state."""
    for step in (1, 2):
        checkpointing.save(tmp_path, _state(step), keep=2)
    monkeypatch.setattr(checkpointing.shutil, "rmtree", lambda *_, **__: None)  # killed before a file is gone
    checkpointing.save(tmp_path, _state(2), keep=2)
    checkpointing.save(tmp_path, _state(3), keep=2)
    assert checkpointing.steps(tmp_path) == [2, 3]
    monkeypatch.undo()
    assert checkpointing.load_newest(tmp_path).step == 3
    assert not list(tmp_path.glob(".*"))


def test_nothing_yet_is_none(tmp_path):
    assert checkpointing.load_newest(tmp_path) is None
    assert checkpointing.load_newest(tmp_path / "not there") is None


def test_an_optimizer_comes_back_exactly():
    torch.manual_seed(0)
    module, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(module.state_dict())
    ours, theirs = torch.optim.AdamW(module.parameters()), torch.optim.AdamW(twin.parameters())
    x = torch.randn(5, 3)
    module(x).sum().backward()
    ours.step()
    twin.load_state_dict(module.state_dict())
    saved = {key: value.clone() for key, value in checkpointing.optimizer_tensors(module, ours).items()}
    checkpointing.restore_optimizer(twin, theirs, saved)
    for net, optimizer in ((module, ours), (twin, theirs)):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.weight, twin.weight)


def test_weights_of_another_model_are_refused_by_name():
    with pytest.raises(ResumeError, match="weight"):
        checkpointing.restore_module(nn.Linear(3, 2), {**nn.Linear(3, 2).state_dict(), "weight": torch.zeros(4, 4)})


_SHARDED = """
import os, sys
sys.path[:0] = {path!r}
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from bksdm_training import checkpointing

torch.set_num_threads(1)
dist.init_process_group("gloo")

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)

def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

model, optimizer = build()
train(model, optimizer, range(3))
# They may be the model's own, as the optimizer's step counts are: a state is written before anything moves on.
weights = {{key: value.clone() for key, value in checkpointing.module_tensors(model).items()}}
moments = {{key: value.clone() for key, value in checkpointing.optimizer_tensors(model, optimizer).items()}}
train(model, optimizer, range(3, 6))
whole = checkpointing.module_tensors(model)
again, optimizer = build()
checkpointing.restore_module(again, weights)
checkpointing.restore_optimizer(again, optimizer, moments)
train(again, optimizer, range(3, 6))
broken = checkpointing.module_tensors(again)
if dist.get_rank() == 0:
    assert len(weights) == 4 and len(moments) == 12, (len(weights), len(moments))
    assert weights["0.weight"].shape == (8, 6)  # whole, not a shard of it
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
else:
    assert not weights  # only the main process need have it
dist.barrier()
os._exit(0)  # torch's own threads now and then abort an orderly end
"""


@pytest.mark.slow
def test_a_sharded_model_and_its_optimizer_come_back_exactly(tmp_path):
    """FSDP2 on two processes. Not shown: a whole distillation under it, which accelerate does on GPUs alone."""
    program = tmp_path / "sharded.py"
    program.write_text(_SHARDED.format(path=sys.path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    made = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, made.stderr
