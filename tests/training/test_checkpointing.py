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
    checkpointing.restore_optimizer(twin, theirs, checkpointing.optimizer_tensors(module, ours))
    for net, optimizer in ((module, ours), (twin, theirs)):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.weight, twin.weight)


def test_weights_of_another_model_are_refused_by_name():
    with pytest.raises(ResumeError, match="weight"):
        checkpointing.restore_module(nn.Linear(3, 2), {**nn.Linear(3, 2).state_dict(), "weight": torch.zeros(4, 4)})
