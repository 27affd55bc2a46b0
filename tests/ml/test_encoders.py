from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    assert embedding.shape == (1, encoder.width) == (1, WIDTHS.get(name, encoder.width))
    about = encoders()[name].about  # what is said of it without building it
    assert about.get("width", encoder.width) == encoder.width
    assert about.get("weights", num_weights(encoder)) == num_weights(encoder)
    embedding.square().sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert len(gradients) == len(list(encoder.parameters())), "every weight is reached"
    assert all(bool(torch.isfinite(g).all()) for g in gradients)

    tensors = {f"encoder.{n}": t for n, t in encoder.state_dict().items()}
    checkpoint.save(tmp_path / "c.safetensors", tensors, own_facts(read_recipe(name), encoder, 0))
    loaded = checkpoint.load_encoder(tmp_path / "c.safetensors").encoder
    with torch.no_grad():
        torch.testing.assert_close(loaded(volume), embedding.detach(), rtol=1e-4, atol=1e-5)


def num_weights(encoder: torch.nn.Module) -> int:
    return sum(p.numel() for p in encoder.parameters())


def test_tiny_has_161_thousand_weights() -> None:
    assert num_weights(build_encoder("tiny")) == 160_656


def test_what_is_said_of_our_own_encoders_is_said_of_each() -> None:
    assert all({"width", "weights", "text"} == set(encoders()[name].about) for name in WIDTHS)


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((n, "group") for n in ENCODERS), *((n, "frozen") for n in ("densenet121", "resnet18", "resnet50", "resnet152"))],
)
@torch.no_grad()
def test_train_and_evaluation_mode_embed_alike(name: str, norm: str) -> None:
    encoder = build_encoder(name, norm)
    volume = torch.randn(2, 1, 32, 32, 32)
    torch.testing.assert_close(encoder.train()(volume), encoder.eval()(volume))
    torch.testing.assert_close(encoder.train()(volume)[:1], encoder.train()(volume[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "shape"),
    [
        ("densenet121", {"norm": "group"}, (2, 32, 32, 32)),
        ("densenet121", {"norm": "batch", "batch": "8"}, (2, 32, 32, 32)),
        ("resnet18", {"norm": "batch", "batch": "8"}, (2, 32, 32, 32)),
        ("resnet50", {"norm": "group"}, (2, 48, 48, 48)),
        ("swinunetr", {}, (1, 64, 32, 32)),
        ("swinunetr", {"output": "decoder"}, (1, 64, 64, 32)),
        ("tiny", {}, (2, 64, 64, 64)),
    ],
)
def test_recomputing_gives_the_same_gradients_and_statistics_and_keeps_less_inside_of_parts(
    name: str, settings: dict[str, str], shape: tuple[int, ...]
) -> None:
    volume = torch.randn(shape[0], 1, *shape[1:])
    gradients, states, kept = [], [], []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        encoder = build_encoder(read_recipe(name, {**settings, "recompute": recompute})).train()
        with kept_bytes() as seen:
            loss = encoder(volume).square().sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
        states.append(encoder.state_dict())
        kept.append(seen[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1], states[0])
    assert kept[1] < 0.6 * kept[0]


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes of distinct tensors that layers leave for the way back; inputs of recomputed parts are not among them."""
    seen: dict[int, int] = {}
    total = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        total[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


@torch.no_grad()
def test_the_decoders_output_is_pooled_ahead_of_its_last_convolution_and_spans_48_dimensions() -> None:
    encoder = build_encoder(read_recipe("swinunetr", {"output": "decoder"})).eval()
    body = encoder.body
    volumes = torch.randn(2, 1, 64, 32, 32)
    slow = body.out(body.net(volumes)).mean((2, 3, 4))
    torch.testing.assert_close(encoder(volumes), slow, rtol=1e-3, atol=1e-5)
    assert torch.linalg.matrix_rank(body.out.conv.conv.weight.flatten(1)) == 48


def test_the_decoders_output_is_of_swinunetr_alone() -> None:
    with pytest.raises(ValueError, match="output=decoder for swinunetr alone"):
        read_recipe("resnet18", {"output": "decoder"})


def test_an_encoder_without_batch_normalisation_refuses_to_freeze_any() -> None:
    with pytest.raises(ValueError, match="Expected norm=group for the encoder swinunetr"):
        build_encoder("swinunetr", "frozen")


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
