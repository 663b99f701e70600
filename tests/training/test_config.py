import pytest

from bksdm_training.config import PRESETS, AdaptConfig, DistillConfig, LoopConfig, TeacherConfig, with_changes


def test_learning_rate_warms_up_stays_and_decays_to_nearly_zero():
    config = LoopConfig(steps=100, batch_size=1, learning_rate=2.0, warmup=10, decay_share=0.25)
    rates = [config.learning_rate_at(step) for step in range(1, 101)]
    assert rates[0] == 0.2
    assert set(rates[9:75]) == {2.0}
    assert rates[75:] == sorted(rates[75:], reverse=True)
    assert 0 < rates[-1] < 0.1


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"decay_share": 1.5}, {"ema_decay": 1.0}])
def test_a_loop_that_cannot_run_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        LoopConfig(**{"steps": 1, "batch_size": 1, "learning_rate": 1.0, **wrong})


def test_a_size_that_does_not_halve_three_times_is_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        TeacherConfig(size=96)


def test_with_changes_touches_what_it_is_told_alone():
    config = with_changes(PRESETS["cpu"], 7, None)
    assert (config.vae.steps, config.unet) == (7, PRESETS["cpu"].unet)


@pytest.mark.parametrize("kind", [DistillConfig, AdaptConfig])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"size": 60}, "multiple of 8 px"), ({"caption_dropout": 2}, "are shares"), ({"skip_limit": -1}, "are shares")],
)
def test_a_run_that_cannot_be_is_refused(kind, wrong, said):
    with pytest.raises(ValueError, match=said):
        kind(**wrong)


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        (DistillConfig, {"start": "x"}, "teacher or random"),
        (AdaptConfig, {"rank": 0}, "at least 1"),
        (AdaptConfig, {"prior_weight": 1.0, "loop": LoopConfig(1, 3, 1.0)}, "has no halves"),
    ],
)
def test_settings_of_one_kind_are_checked(kind, wrong, said):
    with pytest.raises(ValueError, match=said):
        kind(**wrong)
