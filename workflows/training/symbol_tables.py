"""How often a model's symbols occur on training crops, for the tables that code them.

Scales are trained as if symbols were Gaussian. They have more zeros and longer tails: the encoder
rounds down where that saves bits, and a scale is only an estimate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from training_samples import Crops, emphasis, random_steps

from archive_pipeline.pcdc.allocation import LEVELS, TilePlan
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import FIRST_CODED_SCALE, SCALE_COUNT
from archive_pipeline.pcdc.encoding import Encoding
from archive_pipeline.pcdc.model import Model, build_files, gaussian_tables
from archive_pipeline.pcdc.transforms import TransformCodec

SEED = 5  # of the crops
ROUNDS = 2  # the encoder chooses symbols by what the tables say they cost
TRUST = 300.0  # symbols that a table's expectation counts as many as
WIDE = 0.1  # share of the expectation that has WIDER times the scale: pictures unlike training's
WIDER = 2.5


def count_symbols(model: Model, crops: Crops, count: int) -> list[NDArray[np.float64]]:
    """Occurrences of symbols -Q..Q at each scale index, of latents and hyper-latents.

    Image steps are drawn as in training and weighed as its loss weighs them, levels one a crop.
    """
    codec = Codec(model)
    limits = codec.model.tables.zero[:SCALE_COUNT]
    counts = [np.zeros(2 * limit + 1) for limit in limits]
    generator = torch.Generator().manual_seed(SEED)
    for image_step in random_steps(count, generator).tolist():
        pixels = crops.batch(1)[0].permute(1, 2, 0).contiguous().numpy()
        job = Encoding(codec, [pixels])
        level = int(torch.randint(1, LEVELS + 1, (), generator=generator))
        levels = np.full(job.allocator.grids[0], level, np.uint8)
        symbols = job.reconstruct(0, TilePlan(image_step, levels))
        height, width = symbols.q.shape[1:]
        [index] = codec.scale_indices([symbols.z], [image_step])
        q_index = codec.shifted(index, levels, (height, width))
        z_index = codec.z_index(image_step, *symbols.z.shape[1:])
        weight = float(emphasis(torch.tensor(image_step)))
        for index, values in ((q_index, symbols.q), (z_index, symbols.z)):
            for i in np.unique(index[index >= FIRST_CODED_SCALE]):
                limit = limits[i]
                places = np.clip(values[index == i], -limit, limit) + limit
                counts[i] += weight * np.bincount(places, minlength=2 * limit + 1)
    return counts


def fitted_tables(
    networks: TransformCodec, path: Path, size: int, count: int
) -> list[NDArray[np.float64]]:
    """Probabilities of symbols -Q..Q at each scale index, by `count` crops of `size` pixels.

    Positive and negative symbols are alike. Where few occur, they are expected to be Gaussian, a
    tenth of them of a larger scale.

    Raises:
        click.ClickException: the file holds too few images.
    """
    shares = gaussian_tables()
    expected = [
        (1 - WIDE) * row + WIDE * wide
        for row, wide in zip(shares, gaussian_tables(WIDER), strict=True)
    ]
    for _ in range(ROUNDS):
        model = Model(build_files(networks, shares))
        counts = count_symbols(model, Crops(path, size, SEED), count)
        shares = []
        for counted, prior in zip(counts, expected, strict=True):
            both = counted + counted[::-1] + TRUST * prior
            shares.append(both / both.sum())
    return shares
