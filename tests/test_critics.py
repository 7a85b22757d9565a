"""Laws of what judges the VAE: LPIPS as PyTorch computes it, a patch discriminator for clips and images, and their losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from torch import nn as tnn  # noqa: E402

from hunyuan_jax.errors import UserError  # noqa: E402
from hunyuan_jax.lpips_weights import load_lpips  # noqa: E402
from hunyuan_jax.models import critics  # noqa: E402
from hunyuan_jax.models.critics import Discriminator, DiscriminatorConfig  # noqa: E402

SMALL = DiscriminatorConfig(widths=(4, 6, 8), time_halvings=1, convolution="planes")
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in VGG's sequence
SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))


class TorchLPIPS(tnn.Module):
    """VGG-16's layers and the lpips package's head, written out."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512):
            if width == "M":
                layers.append(tnn.MaxPool2d(2, 2))
                continue
            layers += [tnn.Conv2d(channels, width, 3, padding=1), tnn.ReLU()]
            channels = width
        self.features = tnn.Sequential(*layers)
        self.heads = tnn.ParameterList([torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)])

    def forward(self, a, b):
        shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        a, b, total, head = (a - shift) / scale, (b - shift) / scale, 0.0, 0
        for number, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if number in TAPS:
                one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
                total = total + tnn.functional.conv2d((one - other) ** 2, self.heads[head]).mean((2, 3))[:, 0]
                head += 1
        return total


@pytest.fixture(scope="module")
def reference() -> TorchLPIPS:
    torch.manual_seed(0)
    model = TorchLPIPS().requires_grad_(False)
    for layer in model.features:
        if isinstance(layer, tnn.Conv2d):
            tnn.init.kaiming_normal_(layer.weight)  # so that features keep their size down to the last stage
            tnn.init.normal_(layer.bias, std=0.1)
    return model


def torchvision_layout(model) -> dict:
    """As torchvision saves its vgg16, the first layer of its classifier cut short."""
    return {f"features.{name}": value for name, value in model.features.state_dict().items()} | {"classifier.0.bias": torch.zeros(3)}


def head_layout(model) -> dict:
    return {f"lin{i}.model.1.weight": head.data for i, head in enumerate(model.heads)}


def whole_layout(model) -> dict:
    """As the lpips package saves its network: sliced, its heads under two names, its constants beside."""
    sliced = {}
    for name, value in model.features.state_dict().items():
        at = int(name.split(".")[0])
        sliced[f"net.slice{1 + next(i for i, (a, b) in enumerate(SLICES) if a <= at < b)}.{name}"] = value
    heads = head_layout(model)
    again = {f"lins.{name.removeprefix('lin')}": value.clone() for name, value in heads.items()}
    shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    return sliced | heads | again | {"scaling_layer.shift": shift, "scaling_layer.scale": scale}


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory):
    """The same weights in every layout and format: lists of files that make up LPIPS together."""
    folder = tmp_path_factory.mktemp("lpips")
    layouts = {"vgg": torchvision_layout(reference), "head": head_layout(reference), "whole": whole_layout(reference)}
    for name, tensors in layouts.items():
        torch.save(tensors, folder / f"{name}.pt")
        save_file(tensors, folder / f"{name}.safetensors")
    return [[folder / f"{part}.{kind}" for part in parts] for kind in ("pt", "safetensors") for parts in (("vgg", "head"), ("whole",))]


@pytest.fixture(scope="module")
def narrow():
    """LPIPS with few channels: the same network, compiled in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(critics, "VGG_STAGES", tuple(tuple((3, 4) for _ in stage) for stage in critics.VGG_STAGES))
        rng = np.random.default_rng(0)
        shapes = critics.lpips_shapes()
        yield jax.tree.map(lambda leaf: jnp.asarray(np.abs(0.3 * rng.standard_normal(leaf.shape)), jnp.float32), shapes)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_lpips_is_that_of_pytorch_from_every_layout(reference, files):
    first, *others = [load_lpips(parts) for parts in files]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    a, b = images(1, 2, 32, 48, 3), images(1, 2, 32, 48, 3, seed=1)
    ours = jax.jit(critics.lpips_of_clips)(first, a, b)
    theirs = reference(*(torch.from_numpy(x[0]).permute(0, 3, 1, 2) for x in (a, b))).mean().numpy()
    assert theirs > 0.05
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-5)


def test_what_does_not_make_up_lpips_is_said_by_name(reference, tmp_path):
    def refused(tensors, says):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=says):
            load_lpips([tmp_path / "x.safetensors"])

    whole = whole_layout(reference)
    refused(torchvision_layout(reference), r"5 missing, 0 unknown.*lin0\.model\.1\.weight is missing")
    renamed = {name.replace("slice3.14.weight", "slice3.15.weight"): value for name, value in whole.items()}
    refused(renamed, r"net\.slice3\.14\.weight is missing\. Did you mean 'net\.slice3\.15\.weight'")
    refused(whole | {"net.slice9.1.weight": torch.zeros(1)}, r"0 missing, 1 unknown.*slice9\.1\.weight is unknown")
    refused(whole | {"lin2.model.1.weight": torch.zeros(1, 255, 1, 1)}, r"lin2\.model\.1\.weight has shape \(1, 255, 1, 1\), \(1, 256")
    refused(whole | {"net.slice1.0.bias": torch.zeros(64, dtype=torch.int64)}, r"slice1\.0\.bias is int64")
    refused(whole | {"scaling_layer.scale": torch.ones(1, 3, 1, 1)}, r"scaling_layer\.scale is not")
    with pytest.raises(UserError, match="twice"):
        load_lpips([tmp_path / "x.safetensors"] * 2)


def test_lpips_of_equal_frames_is_0_with_a_gradient_that_is_a_number(narrow):
    a = jnp.asarray(images(1, 2, 16, 16, 3))
    value, slope = jax.jit(jax.value_and_grad(lambda b: critics.lpips_of_clips(narrow, a, b)[0]))(a)
    assert value < 1e-12  # a place in a batch decides how sums are rounded
    assert np.isfinite(slope).all()
    assert np.isfinite(jax.grad(lambda x: critics.unit_length(x).sum())(jnp.zeros((1, 1, 1, 3)))).all()


def test_lpips_of_a_clip_is_the_mean_over_frames_or_over_those_its_key_draws(narrow):
    a, b = images(2, 5, 16, 16, 3), images(2, 5, 16, 16, 3, seed=1)
    keys = jax.random.split(jax.random.key(0), 2)
    apply = jax.jit(lambda x, y: critics.LPIPS().apply({"params": narrow}, x, y))
    by_frame = np.stack([apply(x, y) for x, y in zip(a, b, strict=True)])
    np.testing.assert_allclose(jax.jit(critics.lpips_of_clips)(narrow, a, b), by_frame.mean(axis=1), rtol=1e-5)
    chosen = [np.asarray(jax.random.choice(key, 5, (2,), replace=False)) for key in keys]
    drawn = jax.jit(lambda keys: critics.lpips_of_clips(narrow, a, b, keys=keys, frames=2))(keys)
    np.testing.assert_allclose(drawn, [row[index].mean() for row, index in zip(by_frame, chosen, strict=True)], rtol=1e-5)


def test_a_logit_belongs_to_a_patch_of_a_clip_or_of_an_image():
    for config, size in ((DiscriminatorConfig(), 11_056_065), (SMALL, None)):
        params = jax.eval_shape(lambda config=config: critics.init_discriminator(config, jax.random.key(0)))
        assert size in (None, sum(leaf.size for leaf in jax.tree.leaves(params)))
        for frames in (1, 5, 17):
            clip = jax.ShapeDtypeStruct((2, frames, 32, 48, 3), jnp.float32)
            out = jax.eval_shape(lambda p, x, config=config: Discriminator(config).apply({"params": p}, x), params, clip)
            time, space = 2**config.time_halvings, 2 ** (len(config.widths) - 1)
            assert out.shape == (2, 1 + (frames - 1) // time, 32 // space, 48 // space)


@pytest.fixture(scope="module")
def small_discriminator():
    params = jax.jit(lambda key: critics.init_discriminator(SMALL, key))(jax.random.key(0))
    return params, jax.jit(lambda params, x: Discriminator(SMALL).apply({"params": params}, x))


def test_an_image_is_judged_as_a_clip_in_which_nothing_moves(small_discriminator):
    params, apply = small_discriminator
    image = images(2, 1, 16, 16, 3)
    still = apply(params, np.repeat(image, 5, axis=1))
    np.testing.assert_allclose(still, np.repeat(apply(params, image), still.shape[1], axis=1), rtol=1e-4, atol=1e-6)


def test_a_clip_is_judged_alone_and_the_logits_do_not_change_with_the_kernels_size(small_discriminator):
    params, apply = small_discriminator
    clips = images(2, 5, 16, 16, 3)
    out = apply(params, clips)
    np.testing.assert_allclose(out[1:], apply(params, np.concatenate([-clips[:1], clips[1:]]))[1:], atol=1e-6)
    larger = jax.tree_util.tree_map_with_path(lambda path, x: 7.0 * x if path[-1].key == "kernel" else x, params)
    np.testing.assert_allclose(apply(larger, clips), out, rtol=1e-4, atol=1e-6)
    volume = jax.jit(Discriminator(dataclasses.replace(SMALL, convolution="volume")).apply)({"params": params}, clips)
    np.testing.assert_allclose(volume, out, atol=1e-5)


def test_a_spectrally_normal_kernel_has_the_spectral_norm_1():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (48, 6))
    kernel = (u[:, :6] * [5.0, 2.0, 1.0, 0.5, 0.2, 0.1]) @ v
    out = critics.spectrally_normal(jnp.asarray(kernel.reshape(2, 2, 3, 4, 6), jnp.float32), steps=6)
    np.testing.assert_allclose(np.linalg.svd(np.asarray(out).reshape(48, 6))[1], [1.0, 0.4, 0.2, 0.1, 0.04, 0.02], rtol=1e-3)


@pytest.mark.parametrize("wrong", [{"widths": (4,)}, {"time_halvings": 4}, {"power_steps": 0}, {"convolution": "fast"}])
def test_impossible_discriminators_are_refused(wrong):
    with pytest.raises(UserError, match="critic"):
        DiscriminatorConfig(**wrong)


def test_hinge_losses_have_their_closed_forms():
    real, made = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0])
    assert critics.hinge_loss_of_discriminator(real, made) == pytest.approx(0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.0) / 2))
    assert critics.hinge_loss_of_generator(made) == 1.5
    assert critics.hinge_loss_of_discriminator(jnp.array(1.0), jnp.array(-1.0)) == 0


def test_the_adaptive_weight_of_a_linear_layer_has_its_closed_form():
    """For losses 3 w.x and w.y the gradients at w are 3 x and y."""
    x, y = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    one, other = jax.grad(lambda w: 3 * w["w"] @ x)({"w": x}), jax.grad(lambda w: w["w"] @ y)({"w": x})
    assert critics.adaptive_weight(one, other, limit=100.0) == pytest.approx(15 / 2, rel=1e-3)
    assert critics.adaptive_weight(one, other, limit=5.0) == 5.0
    assert critics.adaptive_weight(one, jax.tree.map(jnp.zeros_like, other), limit=5.0) == 5.0
    assert jax.grad(lambda s: critics.adaptive_weight(s * x, y, limit=1e9))(1.0) == 0
