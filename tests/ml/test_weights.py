from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv3d, pad

from ml import checkpoint, weights
from ml.config import read_recipe
from ml.encoders import Encoder, build_encoder
from ml.normalisation import batch_norms
from ml.training import own_facts, start_encoder


def write(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata or None)
    return file


# --- two-dimensional weights -----------------------------------------------------------------------------------------


def flat_densenet() -> tuple[nn.Module, dict[str, Tensor]]:
    from monai.networks.nets.densenet import DenseNet

    net = DenseNet(spatial_dims=2, in_channels=3, out_channels=10)
    learnt(net)
    state = {name.replace(".layers.", "."): tensor for name, tensor in net.state_dict().items()}
    named = {name.replace("class_layers.out.", "classifier."): tensor for name, tensor in state.items()}
    return nn.Sequential(net.features, nn.ReLU()), named


def flat_resnet(block: str, layers: list[int]) -> tuple[nn.Module, dict[str, Tensor]]:
    from monai.networks.nets.resnet import ResNet

    net = ResNet(block, layers, [64, 128, 256, 512], 2, conv1_t_stride=2, num_classes=10, bias_downsample=False)
    learnt(net)
    body = nn.Sequential(*(layer for name, layer in net.named_children() if name not in ("avgpool", "fc")))
    return body, net.state_dict()


def learnt(net: nn.Module) -> None:
    """Statistics as training leaves them, not those of a new layer."""
    for layer in batch_norms(net):
        layer.running_mean.uniform_(-0.2, 0.2)
        layer.running_var.uniform_(0.5, 1.5)
        layer.weight.data.uniform_(0.8, 1.2)
        layer.bias.data.uniform_(-0.1, 0.1)
    net.eval()


FLAT = {
    "densenet121": flat_densenet,
    "resnet18": lambda: flat_resnet("basic", [2, 2, 2, 2]),
    "resnet50": lambda: flat_resnet("bottleneck", [3, 4, 6, 3]),
    "resnet152": lambda: flat_resnet("bottleneck", [3, 8, 36, 3]),
}


def repeat_the_ends_of_depth(encoder: Encoder) -> None:
    """Convolutions go on, over the ends of depth, with the last slice instead of zeros; else as they are."""

    def forward(layer: nn.Conv3d, x: Tensor) -> Tensor:
        z, y, x_ = layer.padding
        padded = pad(pad(x, (x_, x_, y, y)), (0, 0, 0, 0, z, z), mode="replicate")
        return conv3d(padded, layer.weight, layer.bias, layer.stride)

    for layer in encoder.modules():
        if isinstance(layer, nn.Conv3d):
            layer.forward = forward.__get__(layer)


@pytest.mark.parametrize("name", FLAT)
@torch.no_grad()
def test_inflated_weights_answer_as_the_flat_network_where_the_input_is_constant_along_depth(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    net, state = FLAT[name]()
    recipe = read_recipe(name)
    encoder = build_encoder(recipe, has_statistics=True).eval()
    matched = weights.load_weights(recipe, encoder, write(tmp_path / "w.safetensors", state))
    assert sorted(matched.left) == ["the classifier"]
    assert len(matched.left["the classifier"]) == 2
    assert matched.anew == ()
    assert encoder.frozen_statistics
    slice_B1YX = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    volume = slice_B1YX[:, :, None].expand(-1, -1, 32, -1, -1)
    flat = net.double()(slice_B1YX.expand(-1, 3, -1, -1)).mean((2, 3))
    repeat_the_ends_of_depth(encoder)
    deep = encoder.double()(volume)  # in double, for 36 blocks of random weights make numbers of a million
    torch.testing.assert_close(deep, flat.float(), rtol=1e-4, atol=1e-4 * float(flat.abs().mean()))


@torch.no_grad()
def test_away_from_the_ends_of_depth_the_first_layers_answer_as_flat_ones_and_at_the_ends_they_do_not(
    tmp_path: Path,
) -> None:
    net, state = flat_resnet("basic", [2, 2, 2, 2])
    recipe = read_recipe("resnet18")
    encoder = build_encoder(recipe, has_statistics=True).eval()
    weights.load_weights(recipe, encoder, write(tmp_path / "w.safetensors", state))
    slice_B1YX = torch.randn(1, 1, 32, 32)
    volume = slice_B1YX[:, :, None].expand(-1, -1, 96, -1, -1)
    flat = net[:5](slice_B1YX.expand(-1, 3, -1, -1))
    deep = encoder.body[:5](volume)  # the first four convolutions of 3 reach 4 slices of 24, the stem 2 more
    torch.testing.assert_close(deep[:, :, 6:-6], flat[:, :, None].expand(-1, -1, 12, -1, -1), rtol=1e-4, atol=1e-4)
    assert float((deep[:, :, 0] - flat).abs().max()) > 0.1


def test_zeros_along_depth_reach_no_further_than_the_ends() -> None:
    flat_conv, conv = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv3d(1, 4, 3, padding=1, bias=False)
    conv.weight.data = weights.inflate(flat_conv.weight.data, tuple(conv.weight.shape))
    picture = torch.randn(1, 1, 9, 9)
    made = conv(picture.unsqueeze(2).expand(-1, -1, 7, -1, -1))
    wanted = flat_conv(picture.expand(-1, 3, -1, -1))
    for depth in range(1, 6):
        torch.testing.assert_close(made[:, :, depth], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[:, :, 0], wanted * 2 / 3, rtol=1e-4, atol=1e-5)


def test_older_names_of_densenet_and_those_of_monai_in_3d_are_understood(tmp_path: Path) -> None:
    _, state = flat_densenet()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): t for name, t in state.items()}
    old = {f"module.{name}": t for name, t in old.items() if not name.endswith("num_batches_tracked")}
    recipe = read_recipe("densenet121")
    encoder = build_encoder(recipe, has_statistics=True)
    matched = weights.load_weights(recipe, encoder, write(tmp_path / "w.safetensors", old))
    assert len(matched.inflated) == 120
    assert matched.to_dict()["num_loaded"] == 604  # all but 121 counters and the classifier

    from monai.networks.nets.densenet import DenseNet

    deep = DenseNet(spatial_dims=3, in_channels=1, out_channels=2)
    matched = weights.load_weights(recipe, encoder, write(tmp_path / "deep.safetensors", deep.state_dict()))
    assert matched.inflated == ()
    torch.testing.assert_close(encoder.body.conv0.weight, deep.features.conv0.weight)


def test_statistics_are_left_out_and_told_where_groups_are_wanted(tmp_path: Path) -> None:
    _, state = flat_resnet("basic", [2, 2, 2, 2])
    recipe = read_recipe("resnet18", {"norm": "group"})
    matched = weights.try_encoder(recipe, write(tmp_path / "w.safetensors", state))
    assert len(matched.left["statistics that norm=group has no use for"]) == 3 * 20
    assert "left in the file: the classifier (fc.bias, fc.weight)" in str(matched)


# --- SwinUNETR -------------------------------------------------------------------------------------------------------


def whole_swinunetr() -> dict[str, Tensor]:
    from monai.networks.nets.swin_unetr import SwinUNETR

    torch.manual_seed(5)
    return dict(SwinUNETR(1, 1, feature_size=48).state_dict())


def as_self_supervised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The larger release: `encoder.`, a `0.` too many, the decoder, a token."""
    made = {}
    for name, tensor in state.items():
        bare = name.removeprefix("swinViT.")
        if bare != name:
            made[re.sub(r"^(encoder\.layers\d\.0\.)", r"\g<1>0.", f"encoder.{bare}")] = tensor
        else:
            made[name] = tensor
    norm = {"encoder.norm.weight": torch.ones(768), "encoder.norm.bias": torch.zeros(768)}
    return {**made, **norm, "encoder.mask_token": torch.zeros(1, 48, 1, 1, 1)}


def as_bare_transformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The smaller release: `module.`, `fc1` for `linear1`, heads."""
    made = {
        "module." + name.removeprefix("swinViT.").replace(".linear", ".fc"): tensor
        for name, tensor in state.items()
        if name.startswith("swinViT.")
    }
    heads = {"module.rotation_head.weight": torch.ones(4, 768), "module.norm.weight": torch.ones(768)}
    return {**made, **heads, "module.contrastive_head.bias": torch.ones(512)}


@pytest.mark.parametrize(
    ("layout", "left"),
    [
        (as_self_supervised, ["a last norm that SwinUNETR does not have", "decoder", "the token of masked patches"]),
        (as_bare_transformer, ["a last norm that SwinUNETR does not have", "heads of the self-supervised training"]),
        (dict, ["decoder"]),
    ],
)
def test_every_release_of_swinunetr_weights_gives_the_same_encoder(
    layout: type[dict], left: list[str], tmp_path: Path
) -> None:
    state = whole_swinunetr()
    recipe = read_recipe("swinunetr")
    encoder = build_encoder(recipe)
    matched = weights.load_weights(recipe, encoder, write(tmp_path / "w.safetensors", layout(state)))
    assert sorted(matched.left) == left
    assert matched.anew == ()
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, state[name.replace("body.swin.", "swinViT.")])


def test_a_decoder_is_loaded_where_the_file_has_one_and_begins_anew_where_not(tmp_path: Path) -> None:
    state = whole_swinunetr()
    recipe = read_recipe("swinunetr", {"output": "decoder"})
    encoder = build_encoder(recipe)
    whole = weights.load_weights(recipe, encoder, write(tmp_path / "w.safetensors", as_self_supervised(state)))
    assert whole.anew == ("body.out.conv.conv.weight", "body.out.conv.conv.bias")  # 384 outputs, not one
    assert whole.left["of another shape"] == ["out.conv.conv.bias", "out.conv.conv.weight"]
    torch.testing.assert_close(
        encoder.state_dict()["body.net.encoder1.layer.conv1.conv.weight"].clone(),
        state["encoder1.layer.conv1.conv.weight"],
    )
    bare = weights.try_encoder(recipe, write(tmp_path / "b.safetensors", as_bare_transformer(state)))
    assert len(bare.anew) == 33
    assert all(name.startswith(("body.net.", "body.out.")) and "swinViT" not in name for name in bare.anew)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_named_in_one_error(tmp_path: Path) -> None:
    _, state = flat_resnet("basic", [2, 2, 2, 2])
    state["layer1.0.conv1.weight"] = torch.ones(64, 64, 5, 5)
    state["layer9.weight"] = state.pop("layer2.0.bn1.weight")
    del state["bn1.bias"]
    with pytest.raises(ValueError) as error:
        weights.try_encoder(read_recipe("resnet18"), write(tmp_path / "w.safetensors", state))
    told = str(error.value)
    assert "without a place: layer9.weight" in told
    assert "layer1.0.conv1.weight [64, 64, 5, 5] instead of [64, 64, 3, 3, 3]" in told
    missing = told.partition("that are missing: ")[2]
    assert missing == "body.bn1.bias, body.layer1.0.conv1.weight, body.layer2.0.bn1.weight."


def test_weights_of_another_encoder_are_one_short_error(tmp_path: Path) -> None:
    _, state = flat_densenet()
    with pytest.raises(ValueError, match=r"Expected weights of the encoder tiny, found none among 727 tensors"):
        weights.try_encoder(read_recipe("tiny"), write(tmp_path / "w.safetensors", state))


def test_pickles_parts_of_files_and_bloated_headers_are_refused_before_they_are_read(tmp_path: Path) -> None:
    recipe = read_recipe("tiny")
    pickle = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1)}, pickle)
    with pytest.raises(ValueError, match=r"as \.safetensors, got \.pth: such files are pickles"):
        weights.try_encoder(recipe, pickle)
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(pickle.read_bytes())
    with pytest.raises(ValueError, match="a file of another kind"):
        weights.try_encoder(recipe, renamed)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(write(tmp_path / "w.safetensors", {"w": torch.ones(999)}).read_bytes()[:200])
    with pytest.raises(ValueError, match="Expected a safetensors file"):
        weights.try_encoder(recipe, cut)
    bloated = tmp_path / "bloated.safetensors"
    bloated.write_bytes(struct.pack("<Q", 90 << 20) + b"{}")
    with pytest.raises(ValueError, match=r"header of 33,554,432 bytes at the most"):
        weights.try_encoder(recipe, bloated)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    recipe, encoder = read_recipe("tiny"), build_encoder("tiny")
    state = encoder.state_dict() | {"body.0.bias": torch.full((12,), torch.nan)}
    with pytest.raises(ValueError, match=r"found others in body\.0\.bias"):
        weights.load_weights(recipe, encoder, write(tmp_path / "w.safetensors", state))


# --- our own, and what they say --------------------------------------------------------------------------------------


def test_a_checkpoint_starts_an_encoder_and_says_what_was_left(tmp_path: Path) -> None:
    recipe, given = read_recipe("tiny"), build_encoder("tiny")
    tensors = {f"encoder.{n}": t for n, t in given.state_dict().items()} | {"head.w": torch.ones(2)}
    file = tmp_path / "c.safetensors"
    checkpoint.save(file, tensors, own_facts(recipe, given, 0))
    encoder = start_encoder(recipe, 1, file)
    for mine, theirs in zip(encoder.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert own_facts(recipe, encoder, 1)["loaded"] == {
        "layout": "a checkpoint of Lachesis",
        "num_loaded": 16,
        "num_inflated": 0,
        "left": {"the head": ["head.w"]},
        "zeros": [],
        "anew": [],
    }


def test_bare_weights_start_an_encoder_too(tmp_path: Path) -> None:
    given = build_encoder("tiny")
    file = write(tmp_path / "w.safetensors", given.state_dict())
    encoder = start_encoder(read_recipe("tiny"), 1, file)
    for mine, theirs in zip(encoder.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not checkpoint.has_statistics(file)


def test_a_recipe_takes_the_window_that_weights_declare_unless_another_was_chosen(tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors", {"w": torch.ones(1)}, window_hu="-600, 1500", scale_hu="700")
    recipe = read_recipe("tiny")
    settled = weights.take_declared(recipe, file, {})
    assert (settled.window_hu, settled.scale_hu, settled.centre_hu) == ((-600.0, 1500.0), 700.0, recipe.centre_hu)
    assert settled.clip_hu == (-1000.0, 1500.0), "cached volumes keep what the encoder sees"
    chosen = read_recipe("tiny", {"window_hu": "-600,1500"})
    assert weights.take_declared(chosen, file, {"window_hu": ""}) == settled
    with pytest.raises(ValueError, match="window_hu=-600,1500, which the weights were trained with, got -1000,200"):
        weights.take_declared(recipe, file, {"window_hu": "-1000,200"})
    wrong = write(tmp_path / "x.safetensors", {"w": torch.ones(1)}, window_hu="lung")
    with pytest.raises(ValueError, match="Expected numbers for window_hu in the weights file's metadata, got 'lung'"):
        weights.take_declared(recipe, wrong, {})
