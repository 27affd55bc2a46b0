from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.resnet import ResNet
from safetensors.torch import save_file
from torch import Tensor, nn

from ml.checkpoint import has_statistics
from ml.config import read_recipe
from ml.encoders import Encoder, build_encoder
from ml.registry import find
from ml.weights import inflate, load_weights


def flat(name: str) -> nn.Module:
    """The network in two dimensions with three colours, its statistics as after some training."""
    torch.manual_seed(0)
    if name == "densenet121":
        net: nn.Module = DenseNet(spatial_dims=2, in_channels=3, out_channels=10)
    else:
        block, layers = {"resnet18": ("basic", [2, 2, 2, 2]), "resnet50": ("bottleneck", [3, 4, 6, 3])}[name]
        net = ResNet(
            block, layers, [64, 128, 256, 512], spatial_dims=2, n_input_channels=3, conv1_t_stride=2, num_classes=10
        )
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(layer.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net.eval()


def torchvision_names(net: nn.Module) -> dict[str, Tensor]:
    """Its tensors under the names that ImageNet files have."""
    places = net.state_dict().items()
    named = {name.replace("class_layers.out", "classifier"): tensor for name, tensor in places}
    return {re.sub(r"(denselayer\d+)\.layers\.", r"\1.", name): tensor for name, tensor in named.items()}


def inflated(name: str, tmp_path: Path) -> tuple[nn.Module, Encoder, list[str]]:
    net = flat(name)
    save_file(torchvision_names(net), tmp_path / "w.safetensors")
    assert has_statistics(tmp_path / "w.safetensors")
    encoder = build_encoder(name, has_statistics=True)
    made = load_weights(encoder, tmp_path / "w.safetensors", spare=find(name).about["spare"])
    assert made.layout == "imagenet"
    return net, encoder.eval(), made.spare


@pytest.mark.parametrize("name", ["densenet121", "resnet18", "resnet50"])
def test_an_inflated_network_answers_a_volume_that_is_the_same_along_depth_as_its_origin_does(
    name: str, tmp_path: Path
) -> None:
    net, encoder, spare = inflated(name, tmp_path)
    assert {s.split(".")[0] for s in spare} == ({"classifier"} if name == "densenet121" else {"fc"})
    for module in (*net.modules(), *encoder.modules()):
        if isinstance(module, nn.Conv2d | nn.Conv3d) and any(module.padding):  # zeros along depth are no constant
            module.padding_mode = "replicate"
            module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]  # type: ignore[misc]
    slices = torch.randn(2, 1, 64, 64)
    volume = slices.unsqueeze(2).expand(-1, -1, 32, -1, -1)
    with torch.no_grad():
        if name == "densenet121":
            wanted = torch.relu(net.features(slices.expand(-1, 3, -1, -1))).mean((2, 3))  # type: ignore[operator]
        else:
            net.fc = nn.Identity()
            wanted = net(slices.expand(-1, 3, -1, -1))
        torch.testing.assert_close(encoder(volume), wanted, rtol=1e-3, atol=1e-3)


def test_zeros_along_depth_reach_no_further_than_the_ends() -> None:
    flat_conv, conv = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv3d(1, 4, 3, padding=1, bias=False)
    conv.weight.data = inflate(flat_conv.weight.data, tuple(conv.weight.shape))
    picture = torch.randn(1, 1, 9, 9)
    made = conv(picture.unsqueeze(2).expand(-1, -1, 7, -1, -1))
    wanted = flat_conv(picture.expand(-1, 3, -1, -1))
    for depth in range(1, 6):
        torch.testing.assert_close(made[:, :, depth], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[:, :, 0], wanted * 2 / 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_both_self_supervised_swin_files_find_every_place(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    origin = build_encoder("swinunetr")
    tensors = {}
    for name, tensor in origin.state_dict().items():
        short = name.removeprefix("body.swin.")
        if layout == "old":
            tensors["module." + short.replace(".mlp.linear", ".mlp.fc")] = tensor.clone()
        else:
            tensors["encoder." + re.sub(r"^(layers\d)\.0\.", r"\1.0.0.", short)] = tensor.clone()
    tensors |= {
        f"{'module' if layout == 'old' else 'encoder'}.{name}": torch.zeros(3) for name in ("mask_token", "norm.weight")
    }
    save_file(tensors, tmp_path / "w.safetensors")
    torch.manual_seed(2)
    encoder = build_encoder("swinunetr")
    made = load_weights(encoder, tmp_path / "w.safetensors", spare=find("swinunetr").about["spare"])
    assert (made.layout, made.num_tensors, len(made.spare)) == ("swin", len(origin.state_dict()), 2)
    assert all(
        torch.equal(a, b) for a, b in zip(origin.state_dict().values(), encoder.state_dict().values(), strict=True)
    )


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    encoder = build_encoder("tiny")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    file = tmp_path / "w.safetensors"
    for change, words in (
        (lambda t: t.pop("body.0.bias"), "1 of 16 tensors are missing: body.0.bias"),
        (lambda t: t.update({"body.0.bias": torch.zeros(5)}), "1 of 16 tensors have another shape: body.0.bias"),
        (
            lambda t: t.update({"body.99.bias": torch.zeros(5)}),
            "1 of 17 tensors of the file are left over: body.99.bias",
        ),
    ):
        tensors = {name: tensor.clone() + 1 for name, tensor in encoder.state_dict().items()}
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(ValueError, match=re.escape(words)):
            load_weights(encoder, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_pickle_in_disguise_and_a_header_like_a_bomb_are_refused(tmp_path: Path) -> None:
    encoder, file = build_encoder("tiny"), tmp_path / "w.safetensors"
    torch.save(encoder.state_dict(), file)
    with pytest.raises(ValueError, match="safetensors"):
        load_weights(encoder, file)
    file.write_bytes((90 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="header of"):
        load_weights(encoder, file)


@pytest.mark.parametrize(("name", "side"), [("densenet121", 32), ("resnet18", 32), ("swinunetr", 32), ("tiny", 32)])
def test_recomputing_gives_the_same_embedding_and_gradient(name: str, side: int) -> None:
    volume = torch.randn(2, 1, side, side, side)
    results = []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        encoder = build_encoder(read_recipe(name, {"recompute": recompute})).train()
        embedding = encoder(volume)
        embedding.square().sum().backward()
        results.append([embedding.detach(), *(p.grad for p in encoder.parameters())])
    for plain, again in zip(*results, strict=True):
        assert plain is not None and again is not None
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_the_decoder_s_output_spans_48_dimensions() -> None:
    encoder = build_encoder(read_recipe("swinunetr", {"output": "decoder"})).eval()
    with torch.no_grad():
        made = torch.cat([encoder(torch.randn(1, 1, 64, 64, 64) * (i + 1)) for i in range(2)])
    assert made.shape == (2, 384)
    assert torch.linalg.matrix_rank(encoder.body.out.conv.conv.weight.flatten(1)) <= 48  # type: ignore[union-attr,operator]
