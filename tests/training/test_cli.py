import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bksdm_training import cli


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["bksdm-train", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help_needs_no_extra(monkeypatch, capsys):
    code, out, _ = _run(monkeypatch, capsys, "--help")
    assert code == 0
    assert "teacher" in out


def test_an_unknown_source_names_the_choices(monkeypatch, capsys, tmp_path):
    code, _, err = _run(monkeypatch, capsys, "data", "-o", str(tmp_path / "x"), "--sources", "clipart")
    assert code == 2
    assert "fluent, noto" in err


def test_no_data_is_one_sentence(monkeypatch, capsys, tmp_path):
    code, _, err = _run(
        monkeypatch, capsys, "teacher", "--data", str(tmp_path), "-o", str(tmp_path / "run"), "--preset", "cpu"
    )
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("bksdm-train: ")
    assert "make one with bksdm-train data" in err


def test_cuda_without_a_device_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = _run(
        monkeypatch, capsys, "teacher", "--data", str(tmp_path), "-o", str(tmp_path), "--preset", "cuda"
    )
    assert code == 1
    assert "use --preset cpu" in err


def test_diffusers_is_told_to_be_quiet_before_it_is_imported(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    _run(monkeypatch, capsys, "data", "-o", str(tmp_path / "x"), "--sources", "clipart")
    assert os.environ["DIFFUSERS_VERBOSITY"] == "info"
    monkeypatch.delenv("DIFFUSERS_VERBOSITY")
    _run(monkeypatch, capsys, "data", "-o", str(tmp_path / "x"), "--sources", "clipart")
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"


@pytest.mark.parametrize("arguments", [(), ("teacher",), ("nonsense",)])
def test_misuse_is_exit_2(monkeypatch, capsys, arguments):
    code, _, _ = _run(monkeypatch, capsys, *arguments)
    assert code == 2


def _distill(trained, data, output, *more):
    return (
        "distill",
        "--variant=small",
        f"--data={data}",
        f"--teacher={trained / 'checkpoint'}",
        f"--output={output}",
        "--steps=2",
        "--batch-size=4",
        "--shown=0",
        "--cpu",
        *more,
    )


def test_a_student_is_distilled_from_a_cache_and_tracked(monkeypatch, capsys, trained, mini_data, tmp_path):
    cached = tmp_path / "cache"
    code, out, _ = _run(
        monkeypatch,
        capsys,
        "cache",
        f"--data={mini_data / 'train'}",
        f"--teacher={trained / 'checkpoint'}",
        f"--output={cached}",
        "--cpu",
    )
    assert (code, out.strip()) == (0, str(cached))
    code, out, err = _run(monkeypatch, capsys, *_distill(trained, cached, tmp_path / "run"))
    assert (code, out.strip()) == (0, str(tmp_path / "run" / "checkpoint"))
    assert "small: step 2 of 2, task" in err
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out.*")).parent))
    events.Reload()
    assert {"task", "output", "feature_0", "gradient_norm", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("task")] == [1, 2]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--teacher=nowhere",), 1, "there is no nowhere"),
        (("--data=nowhere",), 1, "there is no data at nowhere"),
        (("--batch-size=5", "--micro-batch=2"), 2, "a multiple of 2"),
        (("--size=100",), 2, "multiple of 8"),
        (("--task-weight=0", "--output-weight=0"), 2, "features alone predict nothing"),
        (("--variant=v2-small",), 1, "use --variant small"),
        (("--variant=huge",), 2, "is not one of"),
        (("--mixed-precision=fp16",), 1, "fp16 needs a GPU"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    monkeypatch, capsys, trained, mini_data, tmp_path, more, code, said
):
    found, _, err = _run(monkeypatch, capsys, *_distill(trained, mini_data / "train", tmp_path / "run", *more))
    assert found == code
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "states").exists()


def test_the_defaults_are_the_published_run(monkeypatch, capsys, trained, mini_data, tmp_path):
    """BK-SDM's released weights: AdamW 5e-5 constant, batch 256 in parts of 64 (v2: 128), clip 1."""
    seen = {}
    monkeypatch.setattr("bksdm_training.distill.distill", lambda config, *_: seen.update(config=config) or tmp_path)
    teacher = f"--teacher={trained / 'checkpoint'}"
    for variant, batch in (("small", 256), ("v2-small", 128)):
        data, output = f"--data={mini_data / 'train'}", f"--output={tmp_path / 'run'}"
        assert _run(monkeypatch, capsys, "distill", f"--variant={variant}", teacher, data, output, "--cpu")[0] == 0
        config, loop = seen["config"], seen["config"].loop
        assert (loop.batch_size, config.parts(1)) == (batch, batch // 64)
        assert (loop.steps, loop.learning_rate, loop.warmup, loop.decay_share) == (50_000, 5e-5, 0, 0)
        assert (loop.beta1, loop.beta2, loop.weight_decay, loop.epsilon, loop.clip) == (0.9, 0.999, 1e-2, 1e-8, 1.0)
        assert (loop.seed, loop.checkpoint_every) == (1234, 5000)
        weights = config.weights
        assert (weights.task, weights.output, weights.feature, weights.snr_gamma) == (1, 1, 1, None)
        assert (config.flip, config.caption_dropout, config.start) == (True, 0.0, "teacher")


@pytest.mark.parametrize(
    "option", ["--learning-rate=-1", "--clip=0", "--snr-gamma=0", "--weight-decay=-1", "--seed=18446744073709551616"]
)
def test_numbers_that_would_train_nothing_are_misuse(monkeypatch, capsys, trained, mini_data, tmp_path, option):
    code, _, err = _run(monkeypatch, capsys, *_distill(trained, mini_data / "train", tmp_path / "run"), option)
    assert code == 2
    assert option.split("=")[0] in err
