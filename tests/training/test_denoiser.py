from dataclasses import replace

import torch
from diffusers import DDPMScheduler

from bksdm import checkpoint
from bksdm.sampling import token_ids
from bksdm_training.config import PRESETS
from bksdm_training.denoiser import SCHEDULER_CONFIG, Denoiser, loss_weights, silence_unseen_tokens, take_over
from bksdm_training.vae import build_vae


def test_loss_weights_are_snr_plus_one_on_the_picture_bounded():
    alphas = DDPMScheduler.from_config(SCHEDULER_CONFIG).alphas_cumprod.double()
    expected = torch.tensor([min(1 / (1 - a), 5.0) * (1 - a) / a for a in alphas.tolist()], dtype=torch.float64)
    torch.testing.assert_close(loss_weights(alphas, 5.0), expected, rtol=3e-15, atol=0)  # measured 3.4e-16


def test_the_denoiser_has_the_stage_pattern_of_sd_v1():
    unet = Denoiser(PRESETS["cpu"], checkpoint.tokenizer()).unet
    assert unet.config["down_block_types"] == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert unet.config["up_block_types"] == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert unet.config["layers_per_block"] == 2
    assert unet.config["mid_block_type"] == "UNetMidBlock2DCrossAttn"


def test_the_demo_family_fits_40_mb_in_half_precision():
    with torch.device("meta"):
        parts = (Denoiser(PRESETS["cpu"], checkpoint.tokenizer()), build_vae(PRESETS["cpu"]))
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    assert parameters * 2 < 36e6  # the tokenizer's files need the rest


def test_the_text_encoder_has_a_row_for_every_one_of_clips_49408_tokens(mini_config):
    tokenizer = checkpoint.tokenizer()
    encoder = Denoiser(mini_config, tokenizer).text_encoder
    assert (len(tokenizer), encoder.config.vocab_size) == (49_408, 49_408)
    assert encoder.get_input_embeddings().weight.shape == (49_408, mini_config.text_width)
    last = token_ids(tokenizer, ["a red apple"])  # ends in the last token of the table, 49407
    assert last.max() == 49_407 == encoder.config.eos_token_id
    assert encoder(last).last_hidden_state.shape == (1, 77, mini_config.text_width)


def test_tokens_that_training_never_showed_embed_to_zero(mini_config):
    encoder = Denoiser(mini_config, checkpoint.tokenizer()).text_encoder
    before = encoder.get_input_embeddings().weight.clone()
    silence_unseen_tokens(encoder, torch.tensor([[5, 7], [7, 9]]))
    after = encoder.get_input_embeddings().weight
    assert torch.equal(after[[5, 7, 9]], before[[5, 7, 9]])
    assert after.abs().sum(1).count_nonzero() == 3


def test_velocity_is_weighed_by_the_same_error_of_the_picture():
    """x_0 - x_0' is s / a of the noise's error, and s of the velocity's: the same weight on the picture either way."""
    alphas = torch.tensor([0.999, 0.5, 0.01, 1e-4], dtype=torch.float64)
    snr = alphas / (1 - alphas)
    of_picture = (snr + 1).clamp(max=5)
    for velocity, share in ((False, (1 - alphas) / alphas), (True, 1 - alphas)):
        weight = loss_weights(alphas, 5.0, velocity=velocity)
        # an error of 1 in the prediction is an error of sqrt(share) in the picture
        torch.testing.assert_close(weight, of_picture * share, rtol=1e-12, atol=0)
    assert torch.isfinite(loss_weights(torch.zeros(1), 5.0, velocity=True)).all()  # a schedule that ends in pure noise


def test_a_unet_of_nearly_the_same_widths_takes_over_what_fits(mini_config, caplog):
    tokenizer = checkpoint.tokenizer()
    narrow = Denoiser(mini_config, tokenizer).unet
    *outer, last = mini_config.unet_channels
    wide = Denoiser(replace(mini_config, unet_channels=(*outer, last + mini_config.unet_groups)), tokenizer).unet
    drawn = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    weights = narrow.state_dict()
    taken = take_over(wide, weights)
    same = {name for name, tensor in drawn.items() if name in weights and tensor.shape == weights[name].shape}
    assert taken == len(same) < len(drawn)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, weights[name] if name in same else drawn[name]), name
    assert f"{taken} of the U-Net's {len(drawn)} tensors" in caplog.text
