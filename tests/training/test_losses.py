"""Every term and every gradient against an independent computation in float64."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from bksdm import block_removal
from bksdm.variants import SMALL, TINY
from bksdm_training.losses import LossWeights, distillation_terms
from bksdm_training.taps import Tapped, taps


def _tensors(*shape: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "weights", [LossWeights(), LossWeights(task=0.5, output=2.0, feature=0.1), LossWeights(output=0.0)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_terms_and_their_gradients_equal_float64(weights, weighted):
    ours, target, theirs = _tensors(3, 4, 8, 8, count=3)
    pairs = [_tensors(3, 6, 4, 4, count=2, seed=1), _tensors(3, 16, 5, count=2, seed=2)]
    example_weights = torch.tensor([0.5, 1.0, 7.0]) if weighted else None
    ours.requires_grad_()
    features = [pair[0].requires_grad_() for pair in pairs]
    terms = distillation_terms(ours, target, features, theirs, [pair[1] for pair in pairs], weights, example_weights)
    torch.stack(list(terms.values())).sum().backward()

    a, b, c = (tensor.detach().numpy().astype(np.float64) for tensor in (ours, target, theirs))
    row = np.ones(3) if example_weights is None else example_weights.numpy().astype(np.float64)
    row = row.reshape(3, 1, 1, 1)
    expected = {"task": weights.task * (row * (a - b) ** 2).sum() / a.size}
    gradient = weights.task * row * 2 * (a - b) / a.size
    if weights.output:
        expected["output"] = weights.output * (row * (a - c) ** 2).sum() / a.size
        gradient = gradient + weights.output * row * 2 * (a - c) / a.size
    for index, pair in enumerate(pairs):
        f, t = (tensor.detach().numpy().astype(np.float64) for tensor in pair)
        expected[f"feature_{index}"] = weights.feature * ((f - t) ** 2).sum() / f.size
        ours_gradient = features[index].grad.numpy()
        # measured 2.6e-9, of gradients up to 0.03
        np.testing.assert_allclose(ours_gradient, weights.feature * 2 * (f - t) / f.size, rtol=0, atol=1e-8)
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        assert terms[key].item() == pytest.approx(value, rel=5e-7), key  # measured 1.3e-7
    np.testing.assert_allclose(
        ours.grad.numpy(), gradient, rtol=0, atol=6e-8
    )  # measured 1.7e-8, of gradients up to 0.16


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("removal", [SMALL, TINY], ids=["small", "tiny"])
def test_the_whole_loss_has_the_parameter_gradients_of_float64(narrow_unet, removal, v2):
    """Independent: diffusers in float64, features through hooks of its own, the sum written out."""
    teacher = narrow_unet(v2=v2)
    student = block_removal.compress(teacher, removal)
    with torch.no_grad():
        for parameter in student.parameters():  # away from the teacher, or output and features would hardly differ
            parameter.add_(0.05 * torch.randn_like(parameter))
    pairs = taps(teacher.config, removal)
    noisy, noise = _tensors(2, 4, 8, 8, count=2)
    (context,) = _tensors(2, 77, 12, count=1)
    timesteps = torch.tensor([20, 700])

    exact = {}
    kept: dict[str, dict[str, torch.Tensor]] = {"teacher": {}, "student": {}}
    for role, unet in (("teacher", teacher), ("student", student)):
        twin = UNet2DConditionModel.from_config(unet.config).double()
        twin.load_state_dict(unet.state_dict())
        for pair in pairs:
            name = getattr(pair, role)
            twin.get_submodule(name).register_forward_hook(
                lambda _, __, out, role=role, name=name: kept[role].update(
                    {name: out[0] if isinstance(out, tuple) else out}
                )
            )
        exact[role] = twin
    with torch.no_grad():
        aim = exact["teacher"](noisy.double(), timesteps, context.double()).sample
    guess = exact["student"](noisy.double(), timesteps, context.double()).sample
    total = ((guess - noise.double()) ** 2).mean() + ((guess - aim) ** 2).mean()
    for pair in pairs:
        total = total + ((kept["student"][pair.student] - kept["teacher"][pair.teacher].detach()) ** 2).mean()
    total.backward()

    guide = Tapped(teacher, [pair.teacher for pair in pairs])
    ours = Tapped(student, [pair.student for pair in pairs])
    ours.unet.enable_gradient_checkpointing()
    ours.train()
    with torch.no_grad():
        theirs, their_features = guide(noisy, timesteps, context)
    predicted, features = ours(noisy, timesteps, context)
    terms = distillation_terms(predicted, noise, features, theirs, their_features, LossWeights())
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=5e-7)  # measured 8e-8
    errors = []
    for (name, parameter), twin in zip(student.named_parameters(), exact["student"].parameters(), strict=True):
        assert parameter.grad is not None, name
        errors.append(((parameter.grad.double() - twin.grad).norm() / twin.grad.norm().clamp(min=1e-6)).item())
    assert max(errors) < 2e-5  # measured 1.8e-6 to 4.1e-6


def test_the_teacher_gets_no_gradient():
    ours, target, theirs = _tensors(1, 4, 2, 2, count=3)
    theirs.requires_grad_()
    terms = distillation_terms(ours.requires_grad_(), target, [], theirs, [], LossWeights())
    terms["output"].backward()
    assert theirs.grad is None


def test_half_precision_is_averaged_in_float32():
    ours, theirs = (torch.full((1, 4, 64, 64), value, dtype=torch.float16) for value in (300.0, 0.0))
    terms = distillation_terms(ours, theirs, [ours], theirs, [theirs], LossWeights())
    for term in terms.values():
        assert term.dtype == torch.float32
        assert term.item() == 300.0**2  # past float16's largest number


def test_other_shapes_are_an_error_and_not_broadcast():
    a, b = torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="shapes differ"):
        distillation_terms(a, b, [], a, [], LossWeights())


@pytest.mark.parametrize("weights", [{"task": -1.0}, {"task": 0.0, "output": 0.0}])
def test_weights_that_train_no_prediction_are_refused(weights):
    with pytest.raises(ValueError, match="loss weights"):
        LossWeights(**weights)
