"""The demo family that ships: what it weighs, what travels with it, and that both forms are the same weights."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from bksdm import checkpoint, digests
from bksdm.block_removal import compress
from bksdm.variants import VARIANTS
from bksdm_evaluation.features import features, load_network
from bksdm_evaluation.generate import generate
from bksdm_evaluation.retrieval import read_dataset
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Images, Pipeline, Request
from bksdm_training import emoji

STUDENTS = ("base", "small", "tiny")
LIMIT = 40_000_000  # bytes, each


def _weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bundle_and_checkpoint_are_within_their_size():
    assert _weight(bundles.demo()) <= LIMIT
    assert _weight(checkpoint.demo_folder()) <= LIMIT


def test_the_bundle_is_whole():
    bundle = bundles.load(bundles.demo())
    assert (bundle.manifest.precision, bundle.manifest.storage) == ("fp32", "fp16")
    assert bundle.manifest.source == "demo"


def _halves(graph: Path) -> set[bytes]:
    """Every constant of a graph that fp16 holds exactly, as fp16 bytes: storage is fp16, small ones stay fp32."""
    model = onnx.load(graph)
    tensors = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    halves = [(tensor, tensor.astype(np.float16)) for tensor in tensors if tensor.dtype in (np.float16, np.float32)]
    return {half.tobytes() for tensor, half in halves if np.array_equal(half.astype(tensor.dtype), tensor)}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the causal mask's -inf stand-in is no weight
@pytest.mark.parametrize(
    ("component", "weights", "own"),
    [
        ("text_encoder", "text_encoder/model", "text_model."),
        ("unet", "unet/diffusion_pytorch_model", ""),
        ("vae_decoder", "vae/diffusion_pytorch_model", ("decoder.", "post_quant_conv.")),
        ("vae_encoder", "vae/diffusion_pytorch_model", ("encoder.", "quant_conv.")),
    ],
)
def test_every_weight_of_the_checkpoint_is_in_the_bundle_bit_for_bit(component, weights, own):
    halves = _halves(bundles.demo() / component / "model.onnx")
    tensors = load_file(checkpoint.demo_folder() / f"{weights}.safetensors")
    mine = {key: tensor.astype(np.float16) for key, tensor in tensors.items() if key.startswith(own)}
    assert len(mine) > 60
    # The exporter turns the matrices of linear layers round.
    missing = [key for key, half in mine.items() if not {half.tobytes(), half.T.tobytes()} & halves]
    assert missing == []


def test_the_parts_hold_all_of_the_checkpoint():
    vae = load_file(checkpoint.demo_folder() / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(key.startswith(("decoder.", "post_quant_conv.", "encoder.", "quant_conv.")) for key in vae)
    text_encoder = load_file(checkpoint.demo_folder() / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in text_encoder)
    assert text_encoder["text_model.embeddings.token_embedding.weight"].shape[0] == 49_408


def test_notices_travel_with_both():
    bundle = bundles.load(bundles.demo())
    loaded = checkpoint.load("demo")
    for notice in ((bundle.root / bundle.manifest.licence.file).read_text(encoding="utf-8"), loaded.licence.notice):
        assert "Microsoft Corporation" in notice
        assert "Miles Johnson" in notice


def test_the_recorded_scores_are_of_the_bundle_that_ships_and_pass_their_bar():
    scores = json.loads((checkpoint.demo_folder() / "retrieval.json").read_text())
    assert scores["bundle"] == bundles.load(bundles.demo()).sha256
    assert scores["captions"] == 200
    assert scores["top1"] >= 0.7
    assert scores["top5"] >= 0.9


def test_the_checkpoint_comes_with_its_card():
    card = (checkpoint.demo_folder() / "README.md").read_text(encoding="utf-8")
    for said in ("bksdm-train distill", "top-1", "Limits"):
        assert said in card


TEACHER = Path(__file__).parents[1] / "checkpoints" / "demo-teacher"


def test_the_teacher_can_be_cut_as_every_variant_and_shares_the_demos_autoencoder():
    teacher, demo = checkpoint.load(str(TEACHER)), checkpoint.load("demo")
    sizes = [sum(p.numel() for p in compress(teacher.unet, VARIANTS[name].removal).parameters()) for name in STUDENTS]
    whole = sum(p.numel() for p in teacher.unet.parameters())
    assert whole > sizes[0] > sizes[1] > sizes[2]
    assert digests.of_parts(teacher)["vae"] == digests.of_parts(demo)["vae"]
    assert "Microsoft Corporation" in teacher.licence.notice
    assert "Miles Johnson" in teacher.licence.notice


def test_the_demo_is_the_teachers_small_student():
    teacher, demo = checkpoint.load(str(TEACHER)), checkpoint.load("demo")
    assert demo.unet.state_dict().keys() == compress(teacher.unet, VARIANTS["small"].removal).state_dict().keys()
    trained = json.loads((checkpoint.demo_folder() / "training.json").read_text())
    assert (trained["variant"], trained["teacher"]) == ("small", TEACHER.name)
    theirs, own = digests.of_parts(teacher), digests.of_parts(demo)
    assert [part for part in own if own[part] == theirs[part]] == ["text_encoder", "vae"]


@pytest.mark.parametrize("folder", [TEACHER, TEACHER.with_name("demo")])
def test_recorded_scores_are_of_the_weights_that_ship(folder):
    scores = json.loads((folder / "scores.json").read_text())
    for role, weights in (("student", folder), ("teacher", TEACHER)):
        recorded, own = scores[role]["sha256"], digests.of_parts(checkpoint.load(str(weights)))
        for part in ("unet", "vae"):  # transformers 5 names the text encoder's weights otherwise
            assert recorded[part] == own[part]


def test_the_teachers_recorded_scores_are_better_than_the_demos():
    scores = json.loads((TEACHER / "scores.json").read_text())
    retrieval = json.loads((checkpoint.demo_folder() / "retrieval.json").read_text())
    found = scores["splits"]["train"]
    assert found["generated"] == retrieval["captions"] == 200
    assert found["top1"] > retrieval["top1"]
    assert found["top5"] > retrieval["top5"]


@pytest.mark.parametrize("prompt", ["a red apple", "a purple giraffe on the moon"])
def test_it_draws_on_a_white_ground(prompt):
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime"))
    [images] = [e for e in pipeline.generate([Request(prompt)]) if isinstance(e, Images)]
    assert images.requests[0].guidance_scale == 2  # the model's own, from its training to its pictures
    pixels = images.pixels[0].astype(float)
    corners = np.stack([pixels[:6, :6], pixels[:6, -6:]])
    assert corners.mean() > 200
    assert pixels.std() > 20


def test_guidance_changes_the_picture_and_a_seed_repeats_it():
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime", threads=1))
    draw = partial(generate, pipeline, ["a red apple"], steps=8, seed=3, on_step=lambda _: None)
    guided, again, unguided = (draw(guidance_scale=scale)[0].tobytes() for scale in (2.0, 2.0, 1.0))
    assert guided == again
    assert guided != unguided


@pytest.mark.slow
def test_guided_pictures_are_nearer_to_what_their_captions_say(tmp_path):
    """By a network of another's training: how much nearer a drawing is to its caption's picture than to the others."""
    emoji.build(tmp_path / "data", sources=("fluent",), groups=("animals-nature", "food-drink"), size=128)
    dataset = read_dataset(tmp_path / "data" / "train", 128)
    chosen = dataset.chosen(24)
    network = load_network()
    own = features(network, [dataset.pictures[i] for i in chosen])
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime"))
    nearer = {}
    for scale in (1.0, 2.0):
        drawn = generate(
            pipeline,
            [dataset.captions[i] for i in chosen],
            steps=25,
            guidance_scale=scale,
            seed=0,
            on_step=lambda _: None,
            batch_size=8,
        )
        similarity = features(network, drawn) @ own.T  # [24, 24]
        nearer[scale] = np.diag(similarity).mean() - similarity.mean()
    assert nearer[2.0] > nearer[1.0] > 0  # measured 0.219 and 0.187
