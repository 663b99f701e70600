"""Class pictures drawn by the model itself."""

import pytest
from accelerate import Accelerator

from bksdm import checkpoint
from bksdm_training import prior
from bksdm_training.prior import draw_class
from bksdm_training.records import ResumeError


def test_class_pictures_are_drawn_once_and_the_same_after_a_kill(trained, tmp_path, monkeypatch):
    base, accelerator = checkpoint.load(str(trained / "checkpoint")), Accelerator(cpu=True)

    def draw(prompt="a disc"):
        return draw_class(base, prompt, 6, 64, tmp_path / "class", accelerator, steps=2)

    pictures = sorted(draw().glob("*.png"))
    whole = [picture.read_bytes() for picture in pictures]
    assert len(set(whole)) == 6
    pictures[1].unlink()
    draw()
    assert [picture.read_bytes() for picture in pictures] == whole
    monkeypatch.setattr(prior, "draw", lambda *_, **__: pytest.fail("it drew again"))
    draw()
    with pytest.raises(ResumeError, match="begun with other --class-prompt"):
        draw("a cat")
