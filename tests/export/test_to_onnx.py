"""One graph that is right at every size and batch, equal bytes for equal models, nothing of the machine inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs, to_onnx
from bksdm_export.errors import ExportError
from bksdm_export.wrappers import wrap

# Largest difference over largest value; measured below 3e-6 over all of this file.
TOLERANCE = 2e-5


def export(checkpoint: Checkpoint, component: str, path: Path) -> Path:
    spec = graphs.components(graphs.model_facts(checkpoint), "fp32")[component]
    program = to_onnx.to_exported_program(wrap(checkpoint, component), spec)
    to_onnx.save(to_onnx.to_onnx(program, spec), path)
    return path


def difference(path: Path, inputs: dict[str, np.ndarray], expected: torch.Tensor) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [found] = session.run(None, inputs)
    assert found.shape == tuple(expected.shape)
    assert found.dtype == np.float32
    return float(np.abs(found - expected.numpy()).max() / np.abs(expected.numpy()).max())


def unet_inputs(batch: int, height: int, width: int, context: int, timesteps: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(height * width)
    return (
        torch.randn(batch, 4, height, width, generator=generator),
        torch.rand(timesteps, generator=generator) * 999,
        torch.randn(batch, 77, context, generator=generator),
    )


@pytest.fixture(scope="module")
def unets(build_mini: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple]:
    """unets(kind) -> (checkpoint, path of its U-Net's graph); each made once."""
    folder = tmp_path_factory.mktemp("unets")
    two_stages = {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    settings: dict[str, dict[str, object]] = {
        "four stages": {},
        "tiny": {
            "block_out_channels": [32, 64, 64],
            "layers_per_block": 1,
            "mid_block_type": None,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        },
        "one head": {**two_stages, "attention_head_dim": 1},
        "v2": {
            **two_stages,
            "use_linear_projection": True,
            "attention_head_dim": [2, 4],
            "upcast_attention": True,
        },
    }
    made: dict[str, tuple] = {}

    def unet(kind: str) -> tuple:
        if kind not in made:
            checkpoint = build_mini(unet=settings[kind])
            made[kind] = checkpoint, export(checkpoint, "unet", folder / kind / "model.onnx")
        return made[kind]

    return unet


# In latents. The traced size is 16x24; 8x8 is 64 px, 128x8 is 1024 px on one side.
@pytest.mark.parametrize("kind", ["four stages", "tiny", "v2"])
@pytest.mark.parametrize(
    ("batch", "height", "width", "timesteps"),
    [
        (2, 16, 24, 2),
        (1, 8, 8, 1),
        (2, 8, 12, 1),
        (3, 9, 11, 3),
        (2, 7, 5, 1),
        (1, 128, 8, 1),
        (1, 1, 1, 1),
        (70, 3, 2, 1),
    ],
)
def test_unet_is_right_at_every_size_and_batch(
    unets: Callable[[str], tuple], kind: str, batch: int, height: int, width: int, timesteps: int
) -> None:
    checkpoint, path = unets(kind)
    sample, timestep, context = unet_inputs(batch, height, width, 32, timesteps)
    with torch.no_grad():
        expected = checkpoint.unet(sample, timestep, context).sample
    inputs = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": context.numpy()}
    assert difference(path, inputs, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("side", range(8, 136, 8))
def test_unet_is_right_from_64_to_1024_px(unets: Callable[[str], tuple], side: int) -> None:
    """With one head: eight of them at 1024 px are 17 GB of attention weights."""
    checkpoint, path = unets("one head")
    sample, timestep, context = unet_inputs(1, side, side, 32, 1)
    with torch.no_grad():
        expected = checkpoint.unet(sample, timestep, context).sample
    inputs = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": context.numpy()}
    assert difference(path, inputs, expected) < TOLERANCE


@pytest.fixture(scope="module")
def parts(mini_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Graphs of the mini's other three components."""
    folder = tmp_path_factory.mktemp("parts")
    names = ("text_encoder", "vae_decoder", "vae_encoder")
    return {name: export(mini_checkpoint, name, folder / name / "model.onnx") for name in names}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_text_encoder_is_right_at_every_batch(mini_checkpoint: Checkpoint, parts: dict[str, Path], batch: int) -> None:
    prompts = ["", "a red apple", "a golden vase with flowers", "x" * 400, "\N{CAT FACE}"][:batch]
    tokens = mini_checkpoint.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = mini_checkpoint.text_encoder(tokens).last_hidden_state
    assert difference(parts["text_encoder"], {"input_ids": tokens.int().numpy()}, expected) < TOLERANCE


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 24), (1, 8, 8), (3, 9, 13), (1, 128, 9), (65, 1, 1)])
def test_vae_is_right_at_every_size_and_batch(
    mini_checkpoint: Checkpoint, parts: dict[str, Path], batch: int, height: int, width: int
) -> None:
    latents = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = mini_checkpoint.vae.decode(latents).sample
        parameters = mini_checkpoint.vae.encode(image).latent_dist.parameters
    assert difference(parts["vae_decoder"], {"latent_sample": latents.numpy()}, image) < TOLERANCE
    assert difference(parts["vae_encoder"], {"sample": image.numpy()}, parameters) < TOLERANCE


def test_equal_models_give_equal_bytes(build_smallest: Callable[..., Checkpoint], tmp_path: Path) -> None:
    first, second = (export(build_smallest(), "unet", tmp_path / name / "model.onnx") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_nothing_of_the_machine_is_in_the_graph(parts: dict[str, Path], unets: Callable[[str], tuple]) -> None:
    for path in (*parts.values(), unets("four stages")[1]):
        content = path.read_bytes()
        assert not re.search(rb"site-packages|\.py\b|/(home|root|tmp|usr|work)/|Traceback", content)
        model = onnx.load(path)
        assert not model.metadata_props
        assert not model.doc_string
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        # Shapes of intermediate results would carry the traced sizes; those of weights say nothing new.
        weights = {tensor.name for tensor in model.graph.initializer}
        assert {value.name for value in model.graph.value_info} <= weights


def test_nodes_are_named_after_modules_and_weights_after_the_checkpoint(unets: Callable[[str], tuple]) -> None:
    checkpoint, path = unets("four stages")
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert "down_blocks.0.resnets.0.conv1/Conv" in names
    assert "mid_block.attentions.0.transformer_blocks.0.attn1/Softmax" in names
    weights = {key for key, tensor in checkpoint.unet.state_dict().items() if tensor.ndim > 1}
    stored = {tensor.name.removesuffix("_transposed") for tensor in graph.initializer}
    assert weights <= stored


def test_attention_is_five_nodes(unets: Callable[[str], tuple]) -> None:
    graph = onnx.load(unets("four stages")[1]).graph
    kinds = [
        node.op_type
        for node in graph.node
        if node.name.startswith("mid_block.attentions.0.transformer_blocks.0.attn1/")
    ]
    assert {kind: kinds.count(kind) for kind in ("Mul", "MatMul", "Softmax")} == {"Mul": 1, "MatMul": 2, "Softmax": 1}
    assert "Slice" not in kinds


@pytest.mark.parametrize("component", graphs.COMPONENTS)
def test_tensors_are_those_of_the_contract(
    mini_checkpoint: Checkpoint, parts: dict[str, Path], unets: Callable[[str], tuple], component: str
) -> None:
    spec = graphs.components(graphs.model_facts(mini_checkpoint), "fp32")[component]
    graph = onnx.load(parts[component] if component in parts else unets("four stages")[1]).graph
    for wanted, found in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
        axes = {
            tensor.name: tuple(axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim)
            for tensor in found
        }
        assert axes == {tensor.name: tensor.axes for tensor in wanted}


def test_large_weights_lie_in_one_file_beside_the_graph(
    unets: Callable[[str], tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, whole = unets("tiny")
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_BYTES", 100_000)
    split = tmp_path / "split" / "model.onnx"
    to_onnx.save(ir.load(whole), split)
    assert sorted(path.name for path in split.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert split.stat().st_size < whole.stat().st_size / 4
    sample, timestep, context = unet_inputs(2, 6, 5, 32, 1)
    with torch.no_grad():
        expected = checkpoint.unet(sample, timestep, context).sample
    inputs = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": context.numpy()}
    assert difference(split, inputs, expected) < TOLERANCE


def test_an_axis_that_tracing_fixed_is_refused(mini_checkpoint: Checkpoint) -> None:
    spec = graphs.components(graphs.model_facts(mini_checkpoint), "fp32")["vae_decoder"]

    class Fixed(torch.nn.Module):
        def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 3, 128, 192) + latent_sample.sum()

    program = to_onnx.to_exported_program(Fixed(), spec)
    with pytest.raises(ValueError, match=r"sample is .* in the graph, not"):
        to_onnx.to_onnx(program, spec)


def test_an_axis_of_another_size_than_the_contracts_is_refused(mini_checkpoint: Checkpoint) -> None:
    """4 channels where the contract says 3 were written down as 3."""
    spec = graphs.components(graphs.model_facts(mini_checkpoint), "fp32")["vae_decoder"]

    class Transparent(torch.nn.Module):
        def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(latent_sample, scale_factor=8.0)

    program = to_onnx.to_exported_program(Transparent(), spec)
    with pytest.raises(ValueError, match=r"sample is \[.*,4,.*\] in the graph, not \('batch', 3, "):
        to_onnx.to_onnx(program, spec)


class BoolMasked(torch.nn.Module):
    """A text encoder's attention as transformers 5 writes it: the mask is of booleans, False where masked."""

    output = "last_hidden_state"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(100, width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)[:, None]
        mask = torch.ones(77, 77, dtype=torch.bool).tril().expand(x.shape[0], 1, 77, 77)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)[:, 0]


def test_a_mask_of_booleans_was_added_as_if_it_were_numbers(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    facts = graphs.model_facts(mini_checkpoint)
    spec = graphs.components(facts, "fp32")["text_encoder"]
    module = BoolMasked(facts.context_dim).eval()
    to_onnx.save(to_onnx.to_onnx(to_onnx.to_exported_program(module, spec), spec), tmp_path / "model.onnx")
    ids = torch.randint(0, 100, (3, 77), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(ids)
    assert difference(tmp_path / "model.onnx", {"input_ids": ids.numpy()}, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", [{"is_causal": True}, {"enable_gqa": True}, {"dropout_p": 0.1}])
def test_attention_of_another_kind_is_refused_and_never_written_as_plain(kind: dict[str, object]) -> None:
    with pytest.raises(ExportError, match="causal, grouped or has dropout"):
        to_onnx._attention(None, None, None, **kind)
