"""`bksdm-run` as a user meets it: paths on stdout, notices on stderr, one sentence for what goes wrong, exit codes."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bksdm_runtime import cli
from bksdm_runtime.bundle import file_records, file_sha256
from bksdm_runtime.image import read_request, save_png

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("BKSDM_BUNDLE", raising=False)


@pytest.fixture
def bksdm_run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def quick(toy_bundle: Path) -> Sequence[object]:
    return ("--bundle", toy_bundle, "--backend", "onnxruntime", "--threads", 1, "--steps", 2)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def pictures() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


def test_a_prompt_becomes_a_picture_and_only_its_path_is_printed(bksdm_run: Run, quick: Sequence[object]) -> None:
    assert bksdm_run("A red apple", *quick) == (0, "a-red-apple-0.png\n", "")
    request, provenance = read_request(Path("a-red-apple-0.png"))
    assert (request.prompt, request.seed, request.steps, request.height) == ("A red apple", 0, 2, 64)
    assert (provenance.variant, provenance.backend, provenance.precision) == ("toy", "onnxruntime", "fp32")
    assert pixels("a-red-apple-0.png").shape == (64, 64, 3)
    assert pictures() == ["a-red-apple-0.png"]


def test_every_flag_reaches_the_picture(bksdm_run: Run, toy_bundle: Path) -> None:
    numbers = ("--steps", 3, "--guidance-scale", 2.5, "--seed", -7, "--height", 128, "--width", 192)
    flags = (*numbers, "--scheduler", "euler", "--noise", "cuda")
    code, out, _ = bksdm_run(
        "a", "--bundle", toy_bundle, *flags, "--negative-prompt", "ugly", "-o", "x.png", "--threads", 1
    )
    assert (code, out) == (0, "x.png\n")
    request, _ = read_request(Path("x.png"))
    assert (request.negative_prompt, request.steps, request.guidance_scale, request.seed) == ("ugly", 3, 2.5, -7)
    assert (request.height, request.width, request.sampler, request.noise) == (128, 192, "euler", "cuda")


def test_counted_pictures_use_the_seeds_that_follow(bksdm_run: Run, quick: Sequence[object]) -> None:
    code, out, _ = bksdm_run("a", *quick, "--count", 3, "--seed", 5, "-o", "x.png")
    assert (code, out) == (0, "x-0.png\nx-1.png\nx-2.png\n")
    assert [read_request(Path(f"x-{i}.png"))[0].seed for i in range(3)] == [5, 6, 7]
    bksdm_run("a", *quick, "--seed", 6, "-o", "alone.png")
    np.testing.assert_array_equal(pixels("alone.png"), pixels("x-1.png"))


def test_prompts_from_a_file_and_from_stdin(
    bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffa red apple\r\n\n  苹果  \nlast".encode()
    Path("prompts.txt").write_bytes(content)
    code, out, _ = bksdm_run(
        "--prompts-file", "prompts.txt", *quick, "--count", 2, "-o", "o/{index:02}-{prompt}-{seed}"
    )
    names = ["00-a-red-apple-0", "01-a-red-apple-1", "02-苹果-2", "03-苹果-3", "04-last-4", "05-last-5"]
    assert (code, out.split()) == (0, [f"o/{name}.png" for name in names])
    assert read_request(Path("o/02-苹果-2.png"))[0].prompt == "苹果"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    code, out, _ = bksdm_run("--prompts-file", "-", *quick)
    assert out.split() == ["a-red-apple-0.png", "苹果-1.png", "last-2.png"]


def test_an_empty_prompt_is_a_prompt(bksdm_run: Run, quick: Sequence[object]) -> None:
    assert bksdm_run("", *quick) == (0, "untitled-0.png\n", "")


def test_only_the_named_file_is_replaced(bksdm_run: Run, quick: Sequence[object]) -> None:
    assert [bksdm_run("a", *quick)[1] for _ in range(3)] == ["a-0.png\n", "a-0-1.png\n", "a-0-2.png\n"]
    bksdm_run("a", *quick, "-o", "x.png")
    before = pixels("x.png")
    assert bksdm_run("a", *quick, "--seed", 1, "-o", "x.png")[1] == "x.png\n"
    assert (pixels("x.png") != before).any()


def test_the_bundle_may_come_from_the_environment(
    bksdm_run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BKSDM_BUNDLE", str(toy_bundle))
    assert bksdm_run("a", "--steps", 1, "--threads", 1) == (0, "a-0.png\n", "")


def test_without_a_bundle_the_demo_is_used_and_said_so(
    bksdm_run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bksdm_runtime.bundle.demo", lambda: toy_bundle)
    code, out, err = bksdm_run("a", "--steps", 1, "--threads", 1)
    assert (code, out) == (0, "a-0.png\n")
    assert err == (
        "bksdm-run: no --bundle given: this is the demo model that ships with bksdm (64 x 64 pixels); "
        "--bundle or $BKSDM_BUNDLE picks another\n"
    )


def test_without_any_bundle_is_one_sentence(bksdm_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bksdm_runtime.bundle.__file__", str(tmp_path / "bundle.py"))
    code, out, err = bksdm_run("a")
    assert (code, out) == (1, "")
    assert err.startswith(
        "bksdm-run: no --bundle given, $BKSDM_BUNDLE is not set, and this build of bksdm ships no demo"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["unet/model.onnx", "LICENSE"])  # verified before the engines open, and beside that
def test_a_damaged_bundle_is_one_sentence_and_leaves_nothing(
    bksdm_run: Run, toy_copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bksdm_runtime.bundle._SMALL", 0)
    content = bytearray((toy_copy / name).read_bytes())
    content[0] ^= 1
    (toy_copy / name).write_bytes(content)
    flags = ("--bundle", toy_copy, "--backend", "onnxruntime", "--threads", 1, "-o", "pictures/x.png")
    code, out, err = bksdm_run("a", *flags)
    assert (code, out) == (1, "")
    assert f"{name} was changed or damaged" in err
    assert err.count("\n") == 1
    assert not Path("pictures").exists()


def test_verbose_says_what_runs_where(bksdm_run: Run, quick: Sequence[object], toy_bundle: Path) -> None:
    _, _, err = bksdm_run("a", *quick, "-v")
    assert err == f"bksdm-run: {toy_bundle} (toy, fp32) on onnxruntime: f32, 1 thread\nbksdm-run: exact sampling\n"


def test_a_prompt_that_is_cut_is_said_with_what_was_dropped(bksdm_run: Run, quick: Sequence[object]) -> None:
    code, out, err = bksdm_run("apple " * 75 + "a zebra", *quick, "-o", "x.png")
    assert (code, out) == (0, "x.png\n")
    assert err == "bksdm-run: the prompt is too long for the model, this end of it is dropped: a zebra\n"


def test_from_png_makes_the_same_picture_bit_for_bit(bksdm_run: Run, quick: Sequence[object], toy_bundle: Path) -> None:
    prompts = ["a red apple", "苹果", ""]
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    flags = (*quick, "--count", 2, "--negative-prompt", "ugly", "--scheduler", "dpmsolver++", "--guidance-scale", 3.3)
    _, out, _ = bksdm_run("--prompts-file", "prompts.txt", *flags, "--batch-size", 3, "-o", "{index}.png")
    assert len(out.split()) == 4
    for name in out.split():
        code, again, err = bksdm_run("--from-png", name, "--bundle", toy_bundle, "-o", f"again-{name}")
        assert (code, again, err) == (0, f"again-{name}\n", "")
        assert Path(name).read_bytes() == Path(f"again-{name}").read_bytes()  # the texts and the pixels


def test_from_png_without_output_does_not_replace_the_picture(
    bksdm_run: Run, quick: Sequence[object], toy_bundle: Path
) -> None:
    bksdm_run("a", *quick)
    assert bksdm_run("--from-png", "a-0.png", "--bundle", toy_bundle)[:2] == (0, "a-0-1.png\n")


def test_from_png_refuses_another_bundle_naming_both_hashes(
    bksdm_run: Run, quick: Sequence[object], make_toy_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bksdm_run("a", *quick, "-o", "x.png")
    other = make_toy_bundle(tmp_path / "other", dtype="float16")
    code, out, err = bksdm_run("--from-png", "x.png", "--bundle", other)
    assert (code, out) == (1, "")
    assert read_request(Path("x.png"))[1].bundle in err
    assert file_sha256(other / "bundle.json") in err


def test_from_png_of_image_to_image_needs_the_same_init_image(
    bksdm_run: Run, quick: Sequence[object], toy_bundle: Path
) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    start.save("start.png")
    code, _, err = bksdm_run("a", *quick, "--init-image", "start.png", "--strength", 0.6, "-o", "x.png")
    assert (code, err) == (0, "")
    again = ("--from-png", "x.png", "--bundle", toy_bundle, "-o", "y.png")
    assert bksdm_run(*again)[0] == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()
    start.rotate(90).save("start.png")
    assert bksdm_run(*again) == (
        1,
        "",
        "bksdm-run: x.png was made from the picture start.png, which has changed since\n",
    )
    Path("start.png").unlink()
    assert "start.png, which is not there any more" in bksdm_run(*again)[2]


def test_from_png_of_an_init_image_that_cannot_be_read_is_one_sentence(
    bksdm_run: Run, quick: Sequence[object], toy_bundle: Path
) -> None:
    Image.new("RGB", (8, 8), "red").save("start.png")
    bksdm_run("a", *quick, "--init-image", "start.png", "-o", "x.png")
    request, provenance = read_request(Path("x.png"))
    for name, reason in (("x" * 300, "File name too long"), (".", "Is a directory")):
        save_png(Path("y.png"), pixels("x.png"), replace(request, init_image=Path(name)), provenance)
        code, out, err = bksdm_run("--from-png", "y.png", "--bundle", toy_bundle)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.endswith(f"which cannot be read: {reason}\n")


def test_from_png_says_what_may_differ(
    bksdm_run: Run, quick: Sequence[object], toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bksdm_run("a", *quick, "-o", "x.png")
    monkeypatch.setattr("bksdm_runtime.pictures.version", lambda: "9.9")
    code, _, err = bksdm_run("--from-png", "x.png", "--bundle", toy_bundle, "-o", "y.png")
    assert code == 0
    assert "this is 9.9: pixels may differ" in err


def test_arithmetic_and_backend_are_kept_and_made_again(bksdm_run: Run, toy_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'bksdm[openvino]'")
    flags = ("--bundle", toy_bundle, "--steps", 2, "--threads", 1, "--pinning")
    code, _, err = bksdm_run("a", *flags, "--backend", "openvino", "--arithmetic", "f32", "-o", "x.png", "-v")
    assert (code, err) == (
        0,
        f"bksdm-run: {toy_bundle} (toy, fp32) on openvino: f32, 1 thread\nbksdm-run: exact sampling\n",
    )
    provenance = read_request(Path("x.png"))[1]
    assert (provenance.backend, provenance.arithmetic, provenance.threads) == ("openvino", "f32", 1)
    assert bksdm_run("--from-png", "x.png", "--bundle", toy_bundle, "-o", "y.png") == (0, "y.png\n", "")
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()
    _, _, err = bksdm_run("--from-png", "x.png", "--bundle", toy_bundle, "-o", "z.png", "--backend", "onnxruntime")
    assert err == "bksdm-run: x.png was made on openvino: on onnxruntime pixels may differ\n"


def test_from_png_of_an_arithmetic_that_the_backend_lacks_is_one_sentence(
    bksdm_run: Run, quick: Sequence[object], toy_bundle: Path
) -> None:
    bksdm_run("a", *quick, "-o", "x.png")
    request, provenance = read_request(Path("x.png"))
    save_png(Path("y.png"), pixels("x.png"), request, replace(provenance, arithmetic="bf16"))
    again = ("--from-png", "y.png", "--bundle", toy_bundle, "-o", "z.png")
    code, out, err = bksdm_run(*again)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "backend 'onnxruntime' computes this bundle in f32, not in bf16: leave the arithmetic at auto" in err
    code, out, err = bksdm_run(*again, "--arithmetic", "f32")
    assert (code, err) == (0, "bksdm-run: y.png was made in bf16: in f32 pixels may differ\n")


def test_auto_says_which_backend_and_why(bksdm_run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, _, err = bksdm_run("a", "--bundle", toy_bundle, "--steps", 1, "--threads", 1, "-v")
    assert err == (
        "bksdm-run: backend auto: onnxruntime, because openvino is not installed\n"
        f"bksdm-run: {toy_bundle} (toy, fp32) on onnxruntime: f32, 1 thread\nbksdm-run: exact sampling\n"
    )


@pytest.mark.parametrize("flag", [("--steps", "3"), ("--count", "1"), ("--seed", "0"), ("--batch-size", "2")])
def test_from_png_takes_its_settings_from_the_picture_alone(bksdm_run: Run, flag: tuple[str, str]) -> None:
    code, _, err = bksdm_run("--from-png", "x.png", *flag)
    assert code == 2
    assert f"--from-png takes that from the picture: leave out {flag[0]}" in err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "give one of PROMPT, --prompts-file and --from-png"),
        (("a", "--prompts-file", "x"), 2, "give one of PROMPT, --prompts-file and --from-png"),
        (("a", "red", "apple"), 2, 'quote a prompt of several words: "a red apple"'),
        (("--prompts-file", "none.txt"), 2, "--prompts-file none.txt cannot be read: No such file or directory"),
        (("--prompts-file", "empty.txt"), 2, "--prompts-file empty.txt holds no prompt"),
        (("--prompts-file", "latin.txt"), 2, "--prompts-file latin.txt is not UTF-8 text"),
        (("a", "--scheduler", "magic"), 2, "'magic' is not one of 'pndm', 'ddim', 'euler', 'dpmsolver++'"),
        (("a", "--backend", "tpu"), 2, "'tpu' is not one of 'auto', 'tensorrt', 'tensorrt-rtx', 'cuda', 'openvino'"),
        (("a", "--seed", "x"), 2, "'x' is not a valid integer"),
        (("a", "--seed", 2**64), 2, "seeds go from -9223372036854775808 to 18446744073709551615"),
        (("a", "--seed", 2**64 - 1, "--count", 2), 2, "seeds go from"),
        (("a", "--count", 0), 2, "0 is not in the range 1<=x<=100000"),
        (("a", "--threads", 0), 2, "0 is not in the range x>=1"),
        (("a", "--steps", 0), 2, "bksdm-run: steps must be a whole number from 1 to 1000, found 0"),
        (("a", "--guidance-scale", "nan"), 2, "bksdm-run: guidance_scale must be a number from 1 to 1000"),
        (("a", "--strength", "2"), 2, "bksdm-run: strength must be a number"),
        (
            ("a", "--height", 100),
            2,
            "bksdm-run: height 100 does not fit this model, which takes multiples of 64: the nea",
        ),
        (("a", "--width", 10**6), 2, "bksdm-run: width must be a whole number from 1 to 4096"),
        (
            ("a", "--steps", 1000),
            2,
            "bksdm-run: 1000 pndm steps from the offset 1 start beyond the 1000 timesteps that",
        ),
        (("a", "--steps", 1000, "-o", "new/"), 2, "choose 1 to 999\n"),
        (("a", "--init-image", "red.png", "--strength", 0.01), 2, "leaves none to run: choose at least 0.04"),
        (("a", "--init-image", "float.tiff", "-o", "new/"), 1, "the init image has floating-point pixels"),
        (("a", "--height", 100, "-o", "new/"), 2, "bksdm-run: height 100 does not fit this model"),
        (("a", "--backend", "cuda", "-o", "new/"), 1, "bksdm-run: backend 'cuda': this onnxruntime has no"),
        (("a", "-o", "x.jpg"), 2, "bksdm-run: -o must end in .png, found .jpg"),
        (("a", "-o", "{name}.png"), 2, "bksdm-run: -o has {name}, known are {index}, {n}, {prompt}, {seed}"),
        (("a", "-o", "-"), 2, "bksdm-run: -o - is not taken, for stdout carries the paths of the pictures"),
        (("a", "-o", "x" * 300), 2, f"bksdm-run: -o {'x' * 100}...: File name too long\n"),
        (("a", "-o", f"{'x' * 300}/a.png"), 2, f"bksdm-run: -o {'x' * 100}...: File name too long\n"),
        (("a", "--count", 2, "-o", "x" * 300), 2, f"bksdm-run: -o {'x' * 100}...: File name too long\n"),
        (("\udcff",), 2, "bksdm-run: prompt is not valid Unicode text"),
        (("a", "--init-image", "none.png"), 1, "bksdm-run: there is no picture none.png"),
        (("a", "--init-image", "."), 1, "bksdm-run: . cannot be read as a picture: Is a directory"),
        (("a", "--init-image", "latin.txt"), 1, "bksdm-run: latin.txt cannot be read as a picture"),
        (("a", "-o", "latin.txt/x.png"), 1, "bksdm-run: folder latin.txt cannot be made"),
        (("a", "--bundle", "none"), 1, "bksdm-run: bundle none: there is no such folder"),
        (("--from-png", "none.png"), 1, "bksdm-run: there is no picture none.png"),
        (("--from-png", "latin.txt"), 1, "bksdm-run: latin.txt cannot be read as a picture"),
        (("a", "--backend", "cuda"), 1, "bksdm-run: backend 'cuda': this onnxruntime has no CUDAExecutionProvider"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_its_code(
    bksdm_run: Run,
    toy_bundle: Path,
    arguments: tuple[object, ...],
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BKSDM_BUNDLE", str(toy_bundle))
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Image.new("RGB", (8, 8), "red").save("red.png")
    Image.new("F", (8, 8)).save("float.tiff")
    found, out, err = bksdm_run(*arguments)
    assert sentence in err
    assert (found, out) == (code, "")
    assert "Traceback" not in err
    assert "[Errno" not in err
    assert "stdout" not in err or "-" in arguments
    assert len(err.splitlines()[-1]) < 400
    assert pictures() == ["empty.txt", "float.tiff", "latin.txt", "red.png"]
    assert not Path("new").exists()  # a refused request once left an empty folder


@pytest.mark.parametrize("flags", [("--height", 100), ("--steps", 1000), ("--init-image", "none.png")])
def test_a_request_is_refused_before_any_engine_opens(
    bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...]
) -> None:
    monkeypatch.setattr("bksdm_runtime.pictures.Pipeline", None)
    code, out, err = bksdm_run("a", *quick, *flags, "-o", "new/x.png")
    assert code in (1, 2)
    assert (out, err.count("\n"), Path("new").exists()) == ("", 1, False)


def test_the_number_of_threads_used_is_kept_not_auto(
    bksdm_run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that said "auto" was made again on as many threads as another machine happens to allow."""
    monkeypatch.setattr("bksdm_runtime.backends.ort.physical_cores", lambda: 2)
    bksdm_run("a", "--bundle", toy_bundle, "--backend", "onnxruntime", "--steps", 1, "-o", "x.png")
    assert read_request(Path("x.png"))[1].threads == 2
    monkeypatch.setattr("bksdm_runtime.backends.ort.physical_cores", lambda: 1)
    bksdm_run("--from-png", "x.png", "--bundle", toy_bundle, "-o", "y.png")
    assert read_request(Path("y.png"))[1].threads == 2
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()


def test_a_scheduler_that_the_default_sampler_cannot_use_names_one_that_can(
    bksdm_run: Run, toy_copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    config = toy_copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"skip_prk_steps": true, ', ""))
    records = {name: vars(record) for name, record in file_records(toy_copy).items()}
    rewrite_manifest(toy_copy, lambda content: content.update(files=records))
    code, out, err = bksdm_run("a", "--bundle", toy_copy)
    assert (code, out) == (1, "")
    assert err.endswith("; the sampler ddim or euler or dpmsolver++ can be used\n")
    assert bksdm_run("a", "--bundle", toy_copy, "--scheduler", "euler", "--steps", 1)[0] == 0


def test_a_missing_backend_names_its_extra(
    bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bksdm_runtime.backends.ort", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    sentence = "bksdm-run: backend 'onnxruntime' needs onnxruntime: pip install 'bksdm[cpu]'\n"
    assert bksdm_run("a", *quick) == (2, "", sentence)


def test_an_unwritable_folder_is_noticed_before_the_work(
    bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only writing is refused: what root, who runs tests in containers, never meets.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("bksdm_runtime.pictures.Pipeline", None)
    code, out, err = bksdm_run("a", *quick, "-o", "closed/x.png")
    assert (code, out, err) == (1, "", "bksdm-run: folder closed cannot be written: Permission denied\n")


def test_a_full_disk_is_one_sentence(bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = opened(self, *args, **kwargs)
        if self.suffix == ".part":
            with file:
                file.write(b"half a picture")
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    sentence = "bksdm-run: x.png cannot be written: No space left on device\n"
    assert bksdm_run("a", *quick, "-o", "x.png") == (1, "", sentence)
    assert pictures() == []


def test_memory_running_out_is_one_sentence(
    bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("bksdm_runtime.pipeline.to_uint8", fail)
    sentence = "bksdm-run: out of memory: use a smaller size or --batch-size 1\n"
    assert bksdm_run("a", *quick) == (1, "", sentence)


def spawn(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bksdm_runtime", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, env=environment(), **pipes)  # type: ignore[call-overload]


def test_the_module_runs_as_the_command(toy_bundle: Path) -> None:
    process = spawn("a", "--bundle", toy_bundle, "--steps", 1, "--threads", 1)
    assert process.communicate() == ("a-0.png\n", "")
    assert process.returncode == 0


def test_ctrl_c_ends_with_130_and_nothing_half_written(toy_bundle: Path) -> None:
    many = ("--steps", 500, "--count", 10_000, "--batch-size", 1, "--threads", 1)
    # A shell starts what it puts into the background deaf to Ctrl-C, and processes inherit that: these tests' too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = spawn("a", "--bundle", toy_bundle, *many, "-o", "out/{index}.png")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "out/0.png\n"  # it is in the middle of its work
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "bksdm-run: interrupted")
    assert pictures() == sorted(["out/0.png", *out.split()])
    for name in pictures():
        assert pixels(name).shape == (64, 64, 3)


def test_a_closed_pipe_is_quiet(toy_bundle: Path) -> None:
    many = ("--steps", 1, "--count", 200, "--batch-size", 1, "--threads", 1)
    with spawn("a", "--bundle", toy_bundle, *many) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
    assert len(pictures()) < 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_sentence(toy_bundle: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = spawn("a", "--bundle", toy_bundle, "--steps", 1, "--threads", 1, stdout=full)
        _, err = process.communicate()
    assert (process.returncode, err) == (1, "bksdm-run: stdout cannot be written: No space left on device\n")
    assert pictures() == ["a-0.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_to_a_full_stdout_is_one_sentence(flag: str) -> None:
    with Path("/dev/full").open("w") as full:
        process = spawn(flag, stdout=full)
        _, err = process.communicate()
    assert (process.returncode, err) == (1, "bksdm-run: stdout cannot be written: No space left on device\n")


def test_an_error_of_another_file_is_not_called_stdout(
    bksdm_run: Run, quick: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every OSError was once reported as one of stdout; one that nobody foresaw is a bug, and shows as one."""

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", "model.onnx")

    monkeypatch.setattr("bksdm_runtime.pipeline.to_uint8", fail)
    with pytest.raises(OSError, match="Input/output error"):
        bksdm_run("a", *quick)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_steps_and_which_picture_of_how_many(toy_bundle: Path) -> None:
    import fcntl
    import pty
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))  # rows, columns
    many = ("--steps", 20, "--count", 3, "--batch-size", 2, "--threads", 1)
    process = spawn("a", "--bundle", toy_bundle, *many, stderr=terminal)
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    err = b""
    try:
        while chunk := os.read(screen, 65536):
            err += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(screen)
    shown = err.decode()
    assert out.split() == ["a-0.png", "a-1.png", "a-2.png"]
    assert "images 1-2 of 3: 100%" in shown
    assert "image 3 of 3: 100%" in shown
    assert "21/21" in shown
    assert "it/s" in shown


def test_help_and_version_work_with_click_and_numpy_alone() -> None:
    script = """
import sys
sys.modules.update({name: None for name in ("PIL", "tokenizers", "tqdm", "onnxruntime")})
from bksdm_runtime.cli import run
assert run(["--help"]) == run(["-h"]) == run(["--version"]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--guidance-scale" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("bksdm-run ")
