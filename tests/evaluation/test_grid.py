import numpy as np
from PIL import Image

from bksdm_evaluation.grid import Band, save_grid


def test_the_teacher_stands_above_the_student_in_every_band(tmp_path):
    red, blue = (Image.new("RGB", (32, 24), colour) for colour in ("red", "blue"))
    path = tmp_path / "grid.png"
    save_grid([Band(["one", "two"], [red] * 2, [blue] * 2), Band(["three"], [red], [blue])], path)
    with Image.open(path) as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (2 * (2 * 28 + 14) + 4, 2 * 36 + 4, 3)
    for top, left in ((4, 4), (4, 40), (74, 4)):
        assert (sheet[top : top + 24, left : left + 32] == (255, 0, 0)).all()
        assert (sheet[top + 28 : top + 52, left : left + 32] == (0, 0, 255)).all()
        assert (sheet[top + 52 : top + 66, left : left + 32] < 255).any()  # the caption
    assert [one.name for one in tmp_path.iterdir()] == ["grid.png"]
