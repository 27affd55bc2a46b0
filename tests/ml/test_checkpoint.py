from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ml import checkpoint
from ml.config import read_recipe
from ml.encoders import build_encoder
from ml.training import own_facts


def test_equal_content_makes_an_equal_file(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2, 3)}
    facts = {name: name for name in "hgfedcba"}
    checkpoint.save(tmp_path / "1.safetensors", tensors, facts)
    checkpoint.save(tmp_path / "2.safetensors", dict(reversed(tensors.items())), dict(reversed(facts.items())))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert checkpoint.facts(tmp_path / "1.safetensors") == facts
    assert checkpoint.shapes(tmp_path / "1.safetensors") == {"a": (2, 3), "b": (4,)}
    assert len(list(tmp_path.iterdir())) == 2


def test_numbers_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite numbers in w"):
        checkpoint.save(tmp_path / "c.safetensors", {"w": torch.tensor([1.0, torch.nan])}, {})
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pickle.safetensors"
    torch.save({"w": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="Expected a safetensors file"):
        checkpoint.load_encoder(file)


def test_weights_that_do_not_fit_name_the_first_that_differs(tmp_path: Path) -> None:
    encoder = build_encoder("tiny")
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state["encoder.body.0.weight"] = torch.ones(12, 1, 5, 5, 5)
    checkpoint.save(tmp_path / "c.safetensors", state, own_facts(read_recipe("tiny"), encoder, 0))
    with pytest.raises(
        ValueError, match=r"encoder\.body\.0\.weight of shape \(12, 1, 3, 3, 3\), found \(12, 1, 5, 5, 5\)"
    ):
        checkpoint.load_encoder(tmp_path / "c.safetensors")
