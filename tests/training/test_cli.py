import os

import pytest

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
