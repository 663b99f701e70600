"""Fine-tuning by adapters at a tiny size: what is trained and what is not, files that others read, exact resuming."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from bksdm import checkpoint, lora
from bksdm_training import cli, loop, progress
from bksdm_training.config import AdaptConfig, LoopConfig
from bksdm_training.data import DataError
from bksdm_training.examples import PairedExamples
from bksdm_training.inputs import Inputs
from bksdm_training.lora import Adapters, adapt
from bksdm_training.material import open_material, open_subject
from bksdm_training.records import ResumeError

CONFIG = AdaptConfig(
    size=64,
    rank=2,
    alpha=4.0,
    loop=LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, warmup=0, decay_share=0, checkpoint_every=2),
    shown=0,
)
WITH_TEXT = replace(CONFIG, text_encoder=True)
WITH_PRIOR = replace(CONFIG, prior_weight=0.5)


class KilledError(Exception):
    pass


@pytest.fixture
def base(trained):
    return checkpoint.load(str(trained / "checkpoint"))


@pytest.fixture
def subject(mini_data, tmp_path):
    """Three pictures without captions, one of them called as cameras do."""
    folder = tmp_path / "discs"
    folder.mkdir()
    for source, name in (("0.png", "a.png"), ("1.png", "b.PNG"), ("2.png", "c.png")):
        shutil.copy(mini_data / "train" / source, folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def _run(base, data, output, config=CONFIG, **named):
    return adapt(config, base, open_material(data, base, config), output, Accelerator(cpu=True), **named)


def _with(config=CONFIG, **changes):
    return replace(config, loop=replace(config.loop, **changes))


def _log(output):
    return progress.read_log(output / "states")


def _newest(output):
    states = sorted((output / "states").glob("step-*"))
    return {
        f"{group}:{key}": value
        for group in ("weights", "ema", "optimizer")
        for key, value in load_file(states[-1] / f"{group}.safetensors").items()
    }


@pytest.mark.parametrize("config", [CONFIG, WITH_TEXT])
def test_diffusers_loads_the_file_and_gives_what_the_merged_model_gives(base, mini_data, tmp_path, config):
    before = {key: value.clone() for key, value in base.unet.state_dict().items()}
    file = _run(base, mini_data / "train", tmp_path / "run", config)
    assert all(value.equal(before[key]) for key, value in base.unet.state_dict().items())
    merged = lora.merge(base, file)
    generator = torch.Generator().manual_seed(0)
    noise, ids = torch.randn((2, 4, 8, 8), generator=generator), torch.randint(0, 49408, (2, 77), generator=generator)

    def output(unet, text_encoder):
        with torch.no_grad():
            context = text_encoder(ids).last_hidden_state
            return unet(noise, torch.tensor([5, 700]), context).sample

    without, found = output(base.unet, base.text_encoder), output(merged.unet, merged.text_encoder)
    scheduler = PNDMScheduler.from_config(base.scheduler_config)
    pipeline = StableDiffusionPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(str(file.parent))
    assert (found - without).abs().max() > 0.01
    torch.testing.assert_close(
        output(pipeline.unet, pipeline.text_encoder), found, rtol=0, atol=5e-6
    )  # measured 5.4e-7
    assert any(key.startswith("text_encoder.") for key in load_file(file)) == config.text_encoder


def test_a_run_ends_in_a_file_with_all_that_repeats_it(base, mini_data, tmp_path):
    prompts = ("a disc", "two discs", "three")
    file = _run(base, mini_data / "train", tmp_path, replace(CONFIG, shown=2), prompts=prompts)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    facts = json.loads((tmp_path / "training.json").read_text())
    assert (facts["prompts"], facts["config"]["rank"], facts["data"]["name"]) == (list(prompts), 2, "train")
    assert facts["trained"] == sum(value.numel() for value in load_file(file).values())
    assert str(tmp_path) not in json.dumps(facts)
    notice = (tmp_path / "LICENSE").read_text()
    assert notice.startswith("Changed: these low-rank adapters are changes to checkpoint, trained for 4 steps.")
    assert "public domain" in notice
    merged = lora.merge(base, tmp_path, 0.5)
    assert merged.licence.notice.count("public domain") == 1
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (3 * 68 + 4, 2 * 82 + 4)
    states = sorted((tmp_path / "states").glob("step-*"))
    assert [state.name for state in states] == ["step-00000002", "step-00000004"]
    for state in states:
        assert lora.merge(base, state).source.endswith("at scale 1")
        assert (state / "LICENSE").is_file()
        assert (state / "samples.png").is_file()
    assert (states[-1] / file.name).read_bytes() == file.read_bytes()


def test_a_state_holds_adapters_alone_and_the_file_their_average_with_alpha_in_it(base, mini_data, tmp_path):
    file = load_file(_run(base, mini_data / "train", tmp_path))
    state = _newest(tmp_path)
    assert all("lora_" in key for key in state)
    assert {value.dtype for value in state.values()} == {torch.float32}
    average = {key.removeprefix("ema:"): value for key, value in state.items() if key.startswith("ema:")}
    key = "down_blocks/0/attentions/0/transformer_blocks/0/attn1/to_out/0"
    theirs = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora"
    assert file[f"{theirs}.up.weight"].equal(2 * average[f"weights.unet/{key}/lora_B/default/weight"])
    assert file[f"{theirs}.down.weight"].equal(average[f"weights.unet/{key}/lora_A/default/weight"])
    assert len(file) == len(average)


@pytest.mark.parametrize("config", [CONFIG, WITH_TEXT])
def test_every_gradient_is_that_of_the_merged_weights(base, mini_data, config):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW of W + s B A; U-Net in float64, in which CLIP's mask overflows."""
    config = replace(config, size=128)  # at 64 px the middle attends to one place alone, and its q and k get nothing
    adapters = Adapters(base, config, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapters.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    batch = open_material(mini_data / "train", base, config).examples[0]
    prepare = Inputs(base, torch.device("cpu"))
    noisy, timesteps, target = prepare.noised(batch)
    text = batch.ids if config.text_encoder else prepare.context(batch)
    (adapters(noisy, timesteps, text) - target).square().mean().backward()

    networks = {"unet": base.unet.double(), "text_encoder": base.text_encoder}
    scale, pairs = config.alpha / config.rank, {}
    for key, weight in adapters.weights.items():
        module, role = key.removesuffix("/default/weight").rsplit("/", 1)
        pairs.setdefault(module.replace("/", "."), {})[role] = weight
    for name, pair in pairs.items():
        part, _, module = name.partition(".")
        weight = networks[part].get_submodule(module).weight
        weight.requires_grad_(True)
        weight.data += scale * (pair["lora_B"] @ pair["lora_A"]).detach()
    context = networks["text_encoder"](batch.ids).last_hidden_state.double()
    eps = networks["unet"](noisy.double(), timesteps, context).sample
    (eps - target).square().mean().backward()
    errors, sizes = [], []
    for name, pair in pairs.items():
        part, _, module = name.partition(".")
        gradient = networks[part].get_submodule(module).weight.grad.double()
        a, b = pair["lora_A"].detach().double(), pair["lora_B"].detach().double()
        for role, expected in (("lora_B", scale * gradient @ a.T), ("lora_A", scale * b.T @ gradient)):
            assert expected.abs().max() > 0
            errors.append((pair[role].grad - expected).abs().max().item())
            sizes.append(expected.abs().max().item())
    # Of each layer's own largest; of a thousandth of the largest of all where that is more: q and k of a layer that
    # hardly attends are all rounding.
    floor = 1e-3 * max(sizes)
    assert max(error / max(size, floor) for error, size in zip(errors, sizes, strict=True)) < 3e-4  # measured 7.6e-5


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(base, mini_data, tmp_path, monkeypatch):
    config = _with(WITH_TEXT, steps=6)
    _run(base, mini_data / "train", tmp_path / "whole", config)
    original = loop._gradients
    for last in (2, 5):

        def dying(model, loss_at, now, *rest, last=last):
            if now == last:
                raise KilledError
            return original(model, loss_at, now, *rest)

        monkeypatch.setattr(loop, "_gradients", dying)
        with pytest.raises(KilledError):
            _run(base, mini_data / "train", tmp_path / "broken", config)
        monkeypatch.undo()
    file = _run(base, mini_data / "train", tmp_path / "broken", config)
    assert _log(tmp_path / "whole") == _log(tmp_path / "broken")
    whole, broken = _newest(tmp_path / "whole"), _newest(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    for key, value in whole.items():
        assert torch.equal(value, broken[key]), key
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


# Largest relative difference of a loss over four steps, measured: 1.0e-7, and 0 with checkpointing
@pytest.mark.parametrize(("changes", "limit"), [({"micro_batch": 1}, 1e-6), ({"gradient_checkpointing": True}, 0.0)])
def test_how_a_run_is_computed_changes_no_loss(base, subject, mini_data, tmp_path, changes, limit):
    rows = []
    for name, config in (("a", WITH_PRIOR), ("b", replace(WITH_PRIOR, **changes))):
        material = open_subject(subject, "sks disc", base, config, prior=(mini_data / "train", "a disc"))
        adapt(config, base, material, tmp_path / name, Accelerator(cpu=True))
        rows.append(_log(tmp_path / name))
    worst = max(abs(x[key] - y[key]) / x[key] for x, y in zip(*rows, strict=True) for key in x)
    assert set(rows[0][0]) == {"step", "task", "prior"}
    assert worst <= limit


def test_instance_and_class_pictures_come_in_turn_with_draws_of_their_own(base, subject, mini_data):
    material = open_subject(subject, "sks disc", base, WITH_PRIOR, prior=(mini_data / "train", "a disc"))
    assert isinstance(material.examples, PairedExamples)
    ids = {word: base.tokenizer(word).input_ids for word in ("sks disc", "a disc")}
    seen = [material.examples[position] for position in range(6)]
    for position, batch in enumerate(seen):
        wanted = ids["a disc" if position % 2 else "sks disc"]
        assert batch.ids[0, : len(wanted)].tolist() == wanted
    assert not seen[0].noise.equal(seen[1].noise)
    assert material.captions == ("sks disc",)
    assert material.about["class"]["count"] == 12


def test_the_prior_counts_by_its_weight(base, subject, mini_data, tmp_path):
    logs = []
    for name, weight in (("a", 0.5), ("b", 2.0)):
        config = _with(replace(WITH_PRIOR, prior_weight=weight), steps=1)
        material = open_subject(subject, "sks disc", base, config, prior=(mini_data / "train", "a disc"))
        adapt(config, base, material, tmp_path / name, Accelerator(cpu=True))
        logs.append(_log(tmp_path / name)[0])
    assert logs[1]["prior"] == pytest.approx(4 * logs[0]["prior"], rel=1e-6)
    assert logs[1]["task"] == logs[0]["task"]


@pytest.mark.parametrize(
    ("config", "said"), [(replace(CONFIG, rank=4), "settings"), (replace(CONFIG, text_encoder=True), "settings")]
)
def test_going_on_with_something_else_is_refused(base, mini_data, tmp_path, config, said):
    _run(base, mini_data / "train", tmp_path, _with(steps=1))
    with pytest.raises(ResumeError, match=f"begun with other {said}"):
        _run(base, mini_data / "train", tmp_path, config)
    with pytest.raises(ResumeError, match="begun with other data"):
        _run(base, mini_data / "unseen", tmp_path, _with(steps=1))
    with torch.no_grad():
        base.unet.conv_out.bias.add_(1)
    with pytest.raises(ResumeError, match="begun with other --weights"):
        _run(base, mini_data / "train", tmp_path, _with(steps=1))


def test_a_text_encoder_is_not_trained_from_a_cache(base, mini_data, tmp_path):
    material = replace(open_material(mini_data / "train", base, CONFIG), about={"kind": "cache"})
    with pytest.raises(DataError, match="give the pictures"):
        adapt(WITH_TEXT, base, material, tmp_path / "run", Accelerator(cpu=True))
    assert not (tmp_path / "run").exists()


def test_bf16_trains_float32_adapters(base, mini_data, tmp_path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    material = open_material(mini_data / "train", base, WITH_TEXT)
    adapt(WITH_TEXT, base, material, tmp_path, accelerator)
    assert {value.dtype for value in _newest(tmp_path).values()} == {torch.float32}


def _command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["bksdm-train", "lora", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_trains_a_subject_with_pictures_that_the_model_draws(
    trained, subject, tmp_path, monkeypatch, capsys
):
    arguments = ["--weights", trained / "checkpoint", "--data", subject, "-o", tmp_path / "run", "--cpu"]
    arguments += ["--instance-prompt", "sks disc", "--class-prompt", "a disc", "--class-count", "2", "--steps", "2"]
    arguments += ["--batch-size", "2", "--shown", "1"]
    code, out, err = _command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert len(list((tmp_path / "run" / "class").glob("*.png"))) == 2
    facts = json.loads((tmp_path / "run" / "training.json").read_text())
    assert facts["config"]["alpha"] == facts["config"]["rank"] == 8
    assert facts["data"]["class"]["prompt"] == "a disc"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--class-prompt", "a disc"], 2, "--class-prompt needs --instance-prompt"),
        (["--instance-prompt", "x", "--class-count", "3"], 2, "--class-count needs --class-prompt"),
        (["--instance-prompt", "x", "--class-data", "c"], 2, "--class-data needs --class-prompt"),
        (
            ["--instance-prompt", "x", "--class-prompt", "y", "--class-data", "c", "--class-count", "3"],
            2,
            "name one",
        ),
        (["--instance-prompt", "x", "--class-prompt", "y", "--batch-size", "3"], 2, "take an even one"),
        (["--instance-prompt", " "], 1, "need a prompt that says what they show"),
        (["--instance-prompt", "x"], 1, "holds no pictures"),
        ([], 1, "is no data set that is known here"),
        (["--rank", "0"], 2, "--rank"),
        (["--alpha", "0"], 2, "--alpha"),
    ],
)
def test_misuse_is_2_failure_is_1_and_both_are_one_sentence(
    trained, tmp_path, monkeypatch, capsys, arguments, code, said
):
    (tmp_path / "data").mkdir()
    common = ["--weights", trained / "checkpoint", "--data", tmp_path / "data", "-o", tmp_path / "run", "--cpu"]
    found, out, err = _command(monkeypatch, capsys, *common, *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_weights_that_are_not_there(tmp_path, monkeypatch, capsys):
    code, _, err = _command(monkeypatch, capsys, "--weights", "nowhere", "--data", tmp_path, "-o", tmp_path / "run")
    assert code == 1
    assert "there is no nowhere" in err
