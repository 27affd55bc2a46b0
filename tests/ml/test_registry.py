from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ml import registry
from ml.config import read_recipe
from ml.encoders import build_encoder

MINE = """
from torch import nn


def mine():
    body = nn.Sequential(nn.Conv3d(1, 7, 3, 2), nn.ReLU())
    body.width = 7
    return body
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with an encoder of one's own, named to Lachesis."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    file.chmod(0o600)
    monkeypatch.setenv(registry.FILES, str(file))
    return file


def test_an_encoder_is_one_file_with_a_function_of_its_name(files: Path) -> None:
    (files.parent / "mine.toml").write_text('batch = 3\nshape_zyx = [16, 16, 16]\n\n[about]\ntext = "seven channels"\n')
    recipe = read_recipe("mine", {"epochs": "2"})
    assert (recipe.batch, recipe.epochs, recipe.shape_zyx) == (3, 2, (16, 16, 16))
    encoder = build_encoder(recipe)
    assert encoder.width == 7 and encoder(torch.zeros(2, 1, 16, 16, 16)).shape == (2, 7)
    assert registry.find("mine").source == "mine.py"


def test_the_width_of_a_module_that_does_not_say_it_is_tried_out(files: Path) -> None:
    files.write_text(MINE.replace("    body.width = 7\n", ""))
    encoder = build_encoder("mine")
    assert encoder.width == 7 and encoder.training and encoder.body.training


def test_a_file_that_others_can_change_is_not_run(files: Path) -> None:
    files.chmod(0o666)
    with pytest.raises(ValueError, match="chmod go-w"):
        registry.find("mine").load()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def other():\n    pass\n", "a function named mine"),
        ("def mine():\n    return 3\n", "Expected a torch module from the encoder mine, got int"),
        ("from torch import nn\n\n\ndef mine():\n    return nn.Conv3d(2, 2, 3)\n", "to take a volume"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(files: Path, body: str, words: str) -> None:
    files.write_text(body)
    with pytest.raises(ValueError, match=words):
        build_encoder("mine")


def test_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(MINE)
    monkeypatch.setenv(registry.FILES, str(tmp_path / "tiny.py"))
    with pytest.raises(ValueError, match=r"found two: of lachesis and of tiny\.py; rename yours"):
        registry.encoders()


def test_an_installed_package_brings_its_encoders_by_an_entry_point(tmp_path: Path) -> None:
    package = tmp_path / "some_encoders"
    package.mkdir()
    (package / "__init__.py").write_text(MINE.replace("mine", "theirs"))
    (package / "theirs.toml").write_text("batch = 5\n")
    facts = tmp_path / "some_encoders-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: some-encoders\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text("[lachesis.encoders]\ntheirs = some_encoders:theirs\n")
    code = (
        "from ml.registry import find; from ml.config import read_recipe; from ml.encoders import build_encoder; "
        "print(find('theirs').source, read_recipe('theirs').batch, build_encoder('theirs').width)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    made = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert made.stdout.split() == ["some-encoders", "1.2", "5", "7"]


STAND_INS = {
    "merlin": """
from torch import nn


class Merlin(nn.Module):
    def __init__(self, ImageEmbedding=False):
        super().__init__()
        assert ImageEmbedding
        self.norm = nn.BatchNorm3d(1)
        self.norm.running_mean.fill_(0.5)
        self.encode_image = nn.Sequential(nn.Conv3d(1, 2048, 4, 4), self.norm)[0]

    def forward(self, image):
        assert image.shape[2:] == (48, 32, 16), "x, y, z"
        return self.encode_image(self.norm(image)).mean((2, 3, 4)), None
""",
    "lighter_zoo": """
from torch import nn


class SegResEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv3d(1, 8, 3, 2), nn.Conv3d(8, 512, 3, 2)])
        self.norm = nn.BatchNorm3d(8)
        self.norm.running_mean.fill_(0.5)

    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def forward(self, volume):
        levels = []
        for layer in self.down:
            levels.append(volume := layer(volume))
        return levels
""",
}
"""Packages that have the names and shapes of those that docs/encoders.md wraps; their weights are not ours to give."""


@pytest.mark.parametrize(("name", "package"), [("merlin_image", "merlin"), ("ct_fm", "lighter_zoo")])
def test_the_encoders_of_others_that_the_documentation_wraps_embed(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    for language, ending in (("python", "py"), ("toml", "toml")):
        for block in re.findall(rf"```{language}\n(# {name}\.{ending}.*?)```", page, flags=re.DOTALL):
            (tmp_path / f"{name}.{ending}").write_text(block)
    (tmp_path / f"{name}.py").chmod(0o600)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{package}.py").write_text(STAND_INS[package])
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv(registry.FILES, str(tmp_path / f"{name}.py"))
    recipe = read_recipe(name)
    encoder = build_encoder(recipe)
    assert encoder.frozen_statistics
    assert encoder(torch.zeros(2, 1, 16, 32, 48)).shape == (2, encoder.width)
    assert recipe.centre_hu == (-1000 if package == "merlin" else -1024)
