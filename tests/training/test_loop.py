"""The loop: exact resume, averaged weights, and refusing to go on from another model."""

import io
import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from bksdm_training import loop, progress
from bksdm_training.checkpointing import ResumeError, State, load_newest, save
from bksdm_training.config import LoopConfig
from bksdm_training.data import seeded
from bksdm_training.loop import DivergedError

CONFIG = LoopConfig(steps=12, batch_size=1, learning_rate=1e-2, warmup=2, checkpoint_every=4, ema_decay=0.9)


class KilledError(Exception):
    pass


def _train(folder, *, die_at=None, config=CONFIG, width=4, **options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def loss_at(model, step, part):
        if step == die_at:
            raise KilledError
        generator = seeded(0, step)
        x = torch.randn(8, 3, generator=generator)
        return {"mse": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    return loop.run(
        "toy",
        module,
        loss_at,
        config,
        folder,
        accelerator=Accelerator(cpu=True),
        **options,
    )


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    whole = _train(tmp_path / "whole")
    for die_at in (6, 9, 12):
        with pytest.raises(KilledError):
            _train(tmp_path / "broken", die_at=die_at)
    broken = _train(tmp_path / "broken")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[key]), key
    assert progress.read_log(tmp_path / "whole") == progress.read_log(tmp_path / "broken")


def test_what_comes_back_is_the_average_of_the_weights(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(1, 1, bias=False)
    seen = []

    def loss_at(model, step, part):
        seen.append(module.weight.detach().clone())
        return {"mse": module.weight.square().sum()}

    config = LoopConfig(steps=5, batch_size=1, learning_rate=0.1, ema_decay=0.5, checkpoint_every=5)
    start = module.weight.detach().clone()
    made = loop.run(
        "toy", module, loss_at, config, tmp_path, accelerator=Accelerator(cpu=True), on_checkpoint=lambda *_: None
    )
    state = load_newest(tmp_path)
    assert state is not None
    raw = [*seen[1:], state.groups["weights"]["weight"]]
    average = start
    for step, weight in enumerate(raw, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(made.weight.detach(), average, rtol=0, atol=4e-7)  # measured 6e-8 over 5 seeds


def test_a_rate_speeds_up_the_parameters_it_names_and_no_others(tmp_path):
    moved = {}
    for rate in (1.0, 10.0):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 1))
        before = {key: value.clone() for key, value in module.state_dict().items()}
        config = LoopConfig(steps=1, batch_size=1, learning_rate=1e-3, warmup=1, decay_share=0, ema_decay=0.0)
        made = loop.run(
            "toy",
            module,
            lambda model, step, part, module=module: {"sum": module(torch.arange(4)).sum()},
            config,
            tmp_path / str(rate),
            accelerator=Accelerator(cpu=True),
            on_checkpoint=lambda *_: None,
            rates={"0.weight": rate},
        )
        moved[rate] = {key: (value - before[key]).abs().max().item() for key, value in made.state_dict().items()}
    assert moved[10.0]["0.weight"] == pytest.approx(10 * moved[1.0]["0.weight"], rel=1e-4)  # measured 1.2e-5
    assert moved[10.0]["1.weight"] == moved[1.0]["1.weight"]


def test_a_finished_run_is_only_loaded(tmp_path):
    first = _train(tmp_path)
    again = _train(tmp_path, die_at=1)  # no step is taken
    assert torch.equal(first[0].weight, again[0].weight)


def test_a_finished_run_can_be_prolonged(tmp_path):
    _train(tmp_path)
    longer = LoopConfig(**{**CONFIG.__dict__, "steps": 16})
    _train(tmp_path, config=longer)
    assert [row["step"] for row in progress.read_log(tmp_path)] == list(range(1, 17))


def test_fewer_steps_than_were_trained_are_refused(tmp_path):
    _train(tmp_path)
    shorter = LoopConfig(**{**CONFIG.__dict__, "steps": 11})
    with pytest.raises(ResumeError, match="is at step 12 already"):
        _train(tmp_path, config=shorter)


def test_a_state_without_one_of_its_groups_is_one_sentence(tmp_path):
    save(tmp_path, State(3, {"weights": {"a": torch.zeros(1)}}, {"stage": "toy", "made_on": ""}))
    with pytest.raises(ResumeError, match="the state has no ema"):
        _train(tmp_path)


def test_averages_of_another_shape_are_refused_by_name(tmp_path):
    _train(tmp_path)
    state = load_newest(tmp_path)
    ema = {key: value for key, value in state.groups["ema"].items() if key != "2.bias"}
    save(tmp_path, State(state.step, {**state.groups, "ema": ema}, state.facts))
    with pytest.raises(ResumeError, match=r"does not fit this model at 2\.bias"):
        _train(tmp_path)


def test_a_run_whose_newest_state_is_damaged_ends_with_the_same_weights(tmp_path, caplog):
    whole = _train(tmp_path / "whole")
    with pytest.raises(KilledError):
        _train(tmp_path / "broken", die_at=11)
    (tmp_path / "broken" / "step-00000008" / "ema.safetensors").write_bytes(b"cut")
    broken = _train(tmp_path / "broken")
    assert "step-00000008 is damaged" in caplog.text
    for key, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[key]), key


def test_a_log_gets_a_line_a_checkpoint(tmp_path, capsys):
    _train(tmp_path, pictures_at=lambda step: 1000)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+\.\d+|\d\d:\d\d", "#", line) for line in lines] == [
        f"toy: step {step} of 12, mse #, # images/s, # left" for step in (4, 8, 12)
    ]
    assert lines[-1].endswith("00:00 left")


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    _train(tmp_path)
    assert "12/12" in terminal.getvalue()
    assert "images/s=" in terminal.getvalue()
    assert "step 4 of" not in terminal.getvalue()


def test_state_of_another_model_is_refused(tmp_path):
    _train(tmp_path)
    with pytest.raises(ResumeError, match="does not fit this model"):
        _train(tmp_path, width=5)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    module = nn.Linear(1, 1)
    with pytest.raises(DivergedError, match="at step 1"):
        loop.run(
            "toy",
            module,
            lambda model, step, part: {"loss": module.weight.sum() * float("nan")},
            CONFIG,
            tmp_path,
            accelerator=Accelerator(cpu=True),
            on_checkpoint=lambda *_: None,
        )


def test_pictures_that_cannot_be_drawn_cost_no_state(tmp_path, caplog):
    def on_saved(step, average, folder):
        assert (folder / "state.json").is_file()
        raise OSError("no space left")

    _train(tmp_path, on_saved=on_saved)
    assert load_newest(tmp_path).step == 12
    assert "step 12 is saved, but its pictures could not be drawn: no space left" in caplog.text


def test_what_belongs_to_a_state_and_cannot_be_written_leaves_the_one_before(tmp_path):
    def on_checkpoint(step, average, staging):
        (staging / "more.txt").write_text("half")
        if step == 8:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        _train(tmp_path, on_checkpoint=on_checkpoint)
    assert load_newest(tmp_path).step == 4
    assert (tmp_path / "step-00000004" / "more.txt").is_file()
    assert not list(tmp_path.glob(".writing-*"))


def test_a_damaged_state_does_not_count_towards_those_that_are_kept(tmp_path):
    whole = _train(tmp_path / "whole")
    with pytest.raises(KilledError):
        _train(tmp_path / "broken", die_at=11)
    (tmp_path / "broken" / "step-00000008" / "ema.safetensors").write_bytes(b"cut")
    sooner = LoopConfig(**{**CONFIG.__dict__, "checkpoint_every": 2, "keep": 1})
    with pytest.raises(KilledError):
        _train(tmp_path / "broken", die_at=7, config=sooner)
    assert load_newest(tmp_path / "broken").step == 6
    broken = _train(tmp_path / "broken")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[key]), key


def test_parts_of_a_step_have_the_gradient_of_the_whole(tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    made = {}
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def loss_at(model, step, part, parts=parts):
            rows = x.chunk(parts)[part]
            return {"mse": (model(rows) - rows.sum(1, keepdim=True)).square().mean()}

        config = LoopConfig(**{**CONFIG.__dict__, "accumulate": parts})
        folder = tmp_path / str(parts)
        made[parts] = loop.run("toy", module, loss_at, config, folder, accelerator=Accelerator(cpu=True))
        assert len(progress.read_log(folder)) == 12
    for parts in (2, 4):
        torch.testing.assert_close(made[parts].weight, made[1].weight, rtol=0, atol=1e-6)  # measured 0


class Scaler:
    """Stands where torch's GradScaler stands: a scale, and whether the last step was skipped."""

    def __init__(self):
        self.scale = 65536.0

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer, closure=None):
        pass  # as when the gradient overflowed

    def update(self):
        self.scale /= 2

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


def test_an_overflow_under_fp16_is_borne_and_the_scale_goes_on(tmp_path):
    """Not shown: torch's own scaler, which needs a GPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = Scaler()
    module = nn.Linear(1, 1)

    def loss_at(model, step, part):
        return {"loss": model.weight.sum() * (float("inf") if step <= 3 else 1.0)}

    accelerator.backward = lambda loss: loss.backward()
    config = LoopConfig(steps=5, batch_size=1, learning_rate=0.0, checkpoint_every=5)
    loop.run("toy", module, loss_at, config, tmp_path, accelerator=accelerator)
    assert load_newest(tmp_path).facts["scaler"] == {"scale": 2048.0}
    endless = LoopConfig(steps=100, batch_size=1, learning_rate=0.0, checkpoint_every=100)
    with pytest.raises(DivergedError, match="at step 51"):
        loop.run(
            "toy",
            module,
            lambda model, step, part: {"loss": model.weight.sum() * float("inf")},
            endless,
            tmp_path / "endless",
            accelerator=accelerator,
        )
