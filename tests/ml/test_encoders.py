from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ml import checkpoint
from ml.config import read_recipe
from ml.encoders import build_encoder
from ml.normalisation import batch_norms, choose_norm, reestimate_statistics
from ml.registry import encoders
from ml.training import own_facts

ENCODERS = [name for name, known in encoders().items() if known.source == "lachesis"]
WIDTHS = {"resnet18": 512, "resnet50": 2048, "tiny": 64, "densenet121": 1024, "resnet152": 2048, "swinunetr": 768}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_runs_forward_and_backward_and_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(name).train()
    volume = torch.randn(1, 1, 64, 64, 64)
    embedding = encoder(volume)
    assert embedding.shape == (1, WIDTHS[name]) == (1, encoder.width) == (1, encoders()[name].width)
    assert encoders()[name].about["weights"] == sum(p.numel() for p in encoder.parameters())
    embedding.square().sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert len(gradients) == len(list(encoder.parameters())), "every weight is reached"
    assert all(bool(torch.isfinite(g).all()) for g in gradients)

    tensors = {f"encoder.{n}": t for n, t in encoder.state_dict().items()}
    checkpoint.save(tmp_path / "c.safetensors", tensors, own_facts(read_recipe(name), encoder, 0))
    loaded = checkpoint.load_encoder(tmp_path / "c.safetensors").encoder
    with torch.no_grad():
        torch.testing.assert_close(loaded(volume), embedding.detach(), rtol=1e-4, atol=1e-5)


def test_tiny_has_161_thousand_weights() -> None:
    assert sum(p.numel() for p in build_encoder("tiny").parameters()) == 160_656


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_train_and_evaluation_mode_embed_alike(norm: str) -> None:
    encoder = build_encoder("densenet121", norm)
    volume = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.train()(volume), encoder.eval()(volume))
        torch.testing.assert_close(encoder.train()(volume)[:1], encoder.train()(volume[:1]), rtol=1e-3, atol=1e-4)


def test_no_batch_normalisation_is_left_where_groups_are_wanted() -> None:
    for name in ENCODERS:
        assert not batch_norms(build_encoder(name, "group"))
    assert batch_norms(build_encoder("resnet152", "frozen"))


def test_auto_freezes_statistics_only_where_weights_bring_some() -> None:
    assert choose_norm("auto", has_statistics=True) == "frozen"
    assert choose_norm("auto", has_statistics=False) == "group"
    with pytest.raises(ValueError, match="use norm=group"):
        choose_norm("frozen", has_statistics=False)


def test_reestimated_statistics_are_those_of_the_volumes() -> None:
    encoder = build_encoder("densenet121", "frozen")
    first = batch_norms(encoder)[0]
    volumes = torch.randn(6, 1, 32, 32, 32) * 3
    assert reestimate_statistics(encoder, volumes.split(2)) == 6
    with torch.no_grad():
        features = encoder.body.conv0(volumes)
    torch.testing.assert_close(first.running_mean, features.mean((0, 2, 3, 4)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.running_var, features.var((0, 2, 3, 4), correction=0), rtol=1e-3, atol=1e-3)


def test_swinunetr_says_which_sizes_it_takes() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        build_encoder("swinunetr")(torch.zeros(1, 1, 48, 64, 64))


def test_a_mistyped_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No encoder named 'tinny'\. Did you mean 'tiny'"):
        build_encoder("tinny")
