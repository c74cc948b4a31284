"""Judges of texture, and the loss that asks for it: known energies, angles and statistics."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

torch = pytest.importorskip("torch")
texture = pytest.importorskip("texture", reason="needs the `benchmark` extra")
texture_loss = pytest.importorskip("texture_loss", reason="needs the `train` extra")

Picture = NDArray[np.uint8]


def grain(seed: int, contrast: float = 20.0, side: int = 128) -> Picture:
    """Grey noise of that standard deviation around the middle."""
    noise = np.random.default_rng(seed).normal(128, contrast, (side, side))
    return np.rint(noise).clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)


def blurred(picture: Picture, radius: float = 1.0) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def test_texture_errors_are_ratios_of_energies() -> None:
    picture = grain(1)
    assert texture.texture_errors(picture, picture) == (0, 0, 0)
    halved = (128 + (picture.astype(np.float64) - 128) / 2).round().astype(np.uint8)
    # half of the contrast is a quarter of the energy, in every octave
    np.testing.assert_allclose(texture.texture_errors(picture, halved), 2, atol=0.12)
    np.testing.assert_allclose(texture.texture_errors(halved, picture), 2, atol=0.12)
    assert texture.texture_error(picture, halved) == pytest.approx(2, abs=0.05)


def test_other_grain_is_the_same_texture_and_blur_is_not() -> None:
    picture = grain(1)
    other, soft = (texture.texture_errors(picture, p) for p in (grain(2), blurred(picture)))
    assert max(other) < 0.6
    assert soft[0] > 3
    assert soft[0] > soft[1] > soft[2]


def test_flat_pictures_have_no_texture_to_lose() -> None:
    """Rounding's own noise, of a level here and there, is no texture."""
    flat = np.full((64, 64, 3), 90, np.uint8)
    dotted = flat.copy()
    dotted[::8, ::8] += 1
    assert max(texture.texture_errors(flat, dotted)) < 0.3
    assert texture.texture_errors(flat, grain(1, side=64))[0] > 10


def test_only_whole_blocks_count() -> None:
    picture = grain(1, side=96)
    more = np.pad(picture, ((0, 31), (0, 17), (0, 0)))
    noisy = np.pad(grain(2, side=96), ((0, 31), (0, 17), (0, 0)), constant_values=255)
    ours, cut = (
        texture.texture_errors(more, noisy),
        texture.texture_errors(picture, grain(2, side=96)),
    )
    assert ours == cut


def test_orientation_error_is_an_angle() -> None:
    columns = np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    rows = columns.transpose(1, 0, 2)
    assert texture.orientation_error(columns, columns) == 0
    assert texture.orientation_error(columns, 255 - columns) == pytest.approx(0, abs=1e-3)
    assert texture.orientation_error(columns[1:-1, 1:-1], rows[1:-1, 1:-1]) > 85
    diagonal = ((columns.astype(int) + rows) // 2).astype(np.uint8)
    assert texture.orientation_error(columns, diagonal) == pytest.approx(45, abs=6)
    assert texture.orientation_error(grain(1), grain(2)) == pytest.approx(45, abs=3)
    assert texture.orientation_error(grain(1), np.zeros_like(grain(1))) == pytest.approx(45)


def signal(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_the_distance_is_of_means_and_deviations_in_windows() -> None:
    """Of one channel, written out by hand."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(1, 1, 32, 32))).float() for _ in range(2))
    windows = [(r, c) for r in (0, 8, 16) for c in (0, 8, 16)]

    def moments(x: torch.Tensor) -> NDArray[np.float64]:
        parts = [x[0, 0, r : r + 16, c : c + 16].double().numpy() for r, c in windows]
        return np.array([[p.mean(), p.std()] for p in parts])

    variance = float(b.var())
    unit = variance * (1 + texture_loss.FLAT) + texture_loss.LEAST_VARIANCE
    expected = np.square(moments(a) - moments(b)).sum(1).mean() / unit
    found = texture_loss.texture_distance([a], [b], 32)
    # pooling also makes windows that reach over the edge, which hold what is inside
    assert found.item() == pytest.approx(expected, rel=0.5)
    assert texture_loss.texture_distance([b], [b], 32).item() == 0
    # a layer so coarse that a window is one place: a squared distance
    coarse = texture_loss.texture_distance([a], [b], 512).item()
    assert coarse == pytest.approx(float((a - b).square().mean()) / unit, rel=1e-4)


@pytest.mark.usefixtures("lpips_weights")
def test_what_cannot_be_coded_shall_look_alike_and_what_can_shall_be_alike() -> None:
    picture = grain(1)
    x, other, third, soft = map(signal, (picture, grain(2), grain(3), blurred(picture)))
    coded, generated = texture_loss.CODED, texture_loss.GENERATED

    def loss(guesses: tuple[torch.Tensor, torch.Tensor], image_step: int) -> torch.Tensor:
        """Of two guesses from different noise."""
        step, weight = torch.tensor([image_step] * 2), torch.ones(1, 1, 128, 128)
        both = torch.cat(guesses), torch.cat([x, x])
        return texture_loss.realism_loss(*both, step, weight)[0].mean()

    assert loss((other, third), generated) < loss((soft, soft), generated)
    assert loss((soft, soft), coded) < loss((other, third), coded)
    # the same grain whatever the noise is a pattern, and wrong wherever it is
    assert loss((other, third), generated) < loss((other, other), generated) - 0.5
    guess = soft.clone().requires_grad_()
    loss((guess, guess), 40).backward()
    assert guess.grad is not None
    assert guess.grad.isfinite().all()
    assert guess.grad.abs().sum() > 0
