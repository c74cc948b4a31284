"""Where the training of a transform codec starts: a linear transform coder, or other weights."""

from __future__ import annotations

import re
from dataclasses import replace

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import (
    ACTIVATION_BITS,
    FINEST_STEP,
    LAST_SCALE_SHIFT,
    LATENT_GAIN,
    MIN_IMAGE_STEP,
    SCALE_ZERO,
    STEPS_PER_OCTAVE,
    STRIDE,
    WEIGHT_BITS,
)
from archive_pipeline.pcdc.layers import DepthConvBlock
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig


def config_of(weights: dict[str, Tensor]) -> TransformConfig:
    """The widths and depths of a transform codec that has these weights.

    Raises:
        click.ClickException: no codec has.
    """
    try:
        first = weights["g_a.net.1.weight"]
        # blocks at stride 8, two other layers, blocks at stride 16
        analysis, synthesis = (
            sorted(int(found[1]) for name in weights if (found := mixing.fullmatch(name)))
            for mixing in (re.compile(rf"{n}\.net\.(\d+)\.mix\.0\.weight") for n in ("g_a", "g_s"))
        )
        depth_8 = sum(place == 2 + k for k, place in enumerate(analysis))
        depth_16 = len(synthesis) - depth_8
        return TransformConfig(
            latents=len(weights["h_scale.layers.5.weight"]),
            hyper_latents=len(weights["prior.knots"]),
            width_8=len(first),
            width_16=len(weights["g_s.net.0.weight"]),
            depth_8=depth_8,
            depth_16=depth_16,
            edge_kernel=first.shape[-1],
            shortcut=int("g_a.shortcut.weight" in weights),
            extra_depth_16=len(analysis) - depth_8 - depth_16,
        )
    except KeyError as error:
        raise click.ClickException(
            f"no weights of a transform codec: {error} is missing"
        ) from error


def principal_axes(samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), leading axes (d, count) and their standard deviations of samples (n, d)."""
    mean = samples.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(samples.T))
    order = torch.arange(samples.shape[1] - 1, samples.shape[1] - 1 - count, -1)
    return mean, axes[:, order], variance[order].clamp_min(0).sqrt()


@torch.no_grad()
def klt_start(codec: TransformCodec, crops: Tensor) -> None:
    """Set the transforms to the Karhunen-Loeve transform of training patches.

    Residual blocks start as the identity, so analysis and synthesis are then a linear transform
    coder, and training starts where classical codecs stand instead of far below.
    """
    config = codec.config
    patches = F.pixel_unshuffle(crops.float() / 127.5 - 1, 8)
    mean, axes, _ = principal_axes(patches.permute(0, 2, 3, 1).flatten(0, 2), config.width_8)
    fine = F.conv2d(patches, axes.T[..., None, None], -(axes.T @ mean))
    coarse = F.pixel_unshuffle(fine, 2)
    width = min(config.width_16, config.latents)
    shift, joint, deviation = principal_axes(coarse.permute(0, 2, 3, 1).flatten(0, 2), width)

    analysis, synthesis = (
        [m for m in n if isinstance(m, nn.Conv2d)] for n in (codec.g_a.net, codec.g_s.net)
    )
    for conv in (*analysis, *synthesis):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    centre = config.edge_kernel // 2
    analysis[0].weight[:, :, centre, centre] = axes.T
    analysis[0].bias[:] = -(axes.T @ mean)
    analysis[1].weight[:width, :, 0, 0] = joint.T
    analysis[1].bias[:width] = -(joint.T @ shift)
    analysis[2].weight[:width, :width, 0, 0] = torch.eye(width)
    synthesis[0].weight[:width, :width, 0, 0] = torch.eye(width)
    synthesis[1].weight[:, :width, 0, 0] = joint
    synthesis[1].bias[:] = shift
    synthesis[2].weight[:, :, centre, centre] = axes
    synthesis[2].bias[:] = mean
    if config.shortcut and config.latents > width:
        deviation = detail_start(codec, crops, width)

    last = codec.h_scale.layers[-1]
    last.weight *= 0.05
    last.bias[: len(deviation)] = scale_biases(codec, deviation)


def scale_biases(codec: TransformCodec, deviation: Tensor) -> Tensor:
    """Biases of h_scale's last layer that say these standard deviations of y / LATENT_GAIN."""
    deviation = (LATENT_GAIN * deviation).clamp_min(1e-3)
    index = SCALE_ZERO + STEPS_PER_OCTAVE * torch.log2(deviation / FINEST_STEP)
    return index / 2 ** (WEIGHT_BITS + ACTIVATION_BITS - LAST_SCALE_SHIFT)


@torch.no_grad()
def detail_start(codec: TransformCodec, crops: Tensor, first: int) -> Tensor:
    """Set the shortcuts so that latents from `first` on carry detail that those before leave out.

    They get the principal axes of crops' blocks from `first` on, less what the network makes of
    those itself, as far as that is a linear function of its last features. Returns the standard
    deviations (latents,) of all latents / LATENT_GAIN.
    """
    analysis, last = codec.g_a.net, codec.g_a.net[-1]
    signal, features, made = [], [], []
    for part in crops.split(16):
        x = part.float() / 127.5 - 1
        seen = analysis[:-1](x)
        y = F.pad(last(seen)[:, :first], (0, 0, 0, 0, 0, codec.config.latents - first))
        exponent = torch.full_like(y[:, :1], MIN_IMAGE_STEP)
        blocks = (F.pixel_unshuffle(p, STRIDE) for p in (x, codec.g_s(LATENT_GAIN * y, exponent)))
        for kept, planes in zip((signal, made, features), (*blocks, seen), strict=True):
            kept.append(planes.permute(0, 2, 3, 1).flatten(0, 2))
    x, x_bar, seen = torch.cat(signal), torch.cat(made), torch.cat(features)
    mean, axes, _ = principal_axes(x, codec.config.latents)
    axes = axes[:, first:]
    seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
    told = torch.linalg.lstsq(seen.double(), ((x_bar - mean) @ axes).double()).solution.float()
    codec.g_a.shortcut.weight[first:, :, 0, 0] = axes.T
    codec.g_a.shortcut.bias[first:] = -(axes.T @ mean)
    codec.g_s.shortcut.weight[:, first:, 0, 0] = axes
    last.weight[first:, :, 0, 0], last.bias[first:] = -told[:-1].T, -told[-1]
    y = seen[:, :-1] @ last.weight[:, :, 0, 0].T
    y[:, first:] += x @ axes
    return y.std(0)


def with_more_latents(weights: Tensor, shape: torch.Size, latents: int) -> Tensor:
    """A layer's weights for so many latents in the shape for more, the new ones' being zero."""
    for axis, (size, old_size) in enumerate(zip(shape, weights.shape, strict=True)):
        if size != old_size:
            # new latents stand behind the old ones; a plane of steps may stand behind both
            old, plane = weights.tensor_split([latents], axis)
            new = list(old.shape)
            new[axis] = size - old_size
            weights = torch.cat([old, old.new_zeros(new), plane], axis)
    return weights


def places(deeper: nn.Sequential, released: nn.Sequential) -> list[int]:
    """Where the layers of a released network belong in one that has further blocks.

    The further ones stand behind the others of their width.
    """
    found, k = [], 0
    for layer in released:
        while isinstance(deeper[k], DepthConvBlock) and not isinstance(layer, DepthConvBlock):
            k += 1
        found.append(k)
        k += 1
    return found


def take_over(codec: TransformCodec, released: TransformCodec) -> None:
    """Set a codec's weights to released ones of the same widths, of no more blocks or latents.

    Kernels that were smaller are set into the middle of theirs, further latents are zero, and
    further blocks stay as they are: the identity in a codec just made.
    """
    state = codec.state_dict()
    moved = {
        f"{name}.net.{old}.": f"{name}.net.{new}."
        for name in ("g_a", "g_s")
        for old, new in enumerate(
            places(codec.get_submodule(name).net, released.get_submodule(name).net)
        )
    }
    for name, value in released.state_dict().items():
        layer = re.match(r"g_[as]\.net\.\d+\.", name)
        name = moved[layer[0]] + name[layer.end() :] if layer else name
        shape = state[name].shape
        grown = (shape[-1] - value.shape[-1]) // 2 if value.dim() == 4 else 0
        value = F.pad(value, [grown] * 4) if grown else value
        state[name] = with_more_latents(value, shape, released.config.latents)
    codec.load_state_dict(state)


@torch.no_grad()
def widen(wider: TransformCodec, codec: TransformCodec) -> None:
    """Set a codec's weights so that it computes what a narrower one of the same depths does.

    The channels of the narrower one come first and see nothing of the further ones; those start
    from random weights on all channels, so that they have something to offer when training first
    gives them a weight (Net2Net, Chen et al. 2016, without its copies).
    """
    state = wider.state_dict()
    for name, value in codec.state_dict().items():
        state[name][: len(value)] = 0
        state[name][tuple(slice(size) for size in value.shape)] = value
    wider.load_state_dict(state)


def load_released(codec: TransformCodec, released: TransformCodec, crops: Tensor) -> None:
    """Start from released weights, of a codec no wider and no deeper, with a use for what is new.

    Further latents start as `detail_start` sets them, by crops uint8 (n, 3, H, W); their scales
    rise and fall as those of the others do on average. Further blocks start as `take_over` says,
    further channels as `widen` does.
    """
    before = released.config
    same_width = replace(codec.config, width_8=before.width_8, width_16=before.width_16)
    narrow = TransformCodec(same_width)
    take_over(narrow, released)
    if same_width.shortcut and same_width.latents > before.latents:
        start_scales(narrow, detail_start(narrow, crops, before.latents), before.latents)
    widen(codec, narrow)


@torch.no_grad()
def start_scales(codec: TransformCodec, deviation: Tensor, first: int) -> None:
    """Set the scales of latents from `first` on to deviations (latents,) of y / LATENT_GAIN."""
    bias = scale_biases(codec, deviation)
    last = codec.h_scale.layers[-1]
    last.weight[first:] = last.weight[:first].mean(0)
    last.bias[first:] = last.bias[:first].mean() + bias[first:] - bias[:first].mean()
