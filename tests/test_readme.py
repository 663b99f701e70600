"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_makes_its_picture(tmp_path, monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.mode == "RGB"


def test_every_command_of_the_table_is_an_entry_point():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for command in re.findall(r"^\| `(bksdm-\w+)`", README, flags=re.MULTILINE):
        assert f'\n{command} = "' in pyproject
