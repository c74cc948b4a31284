"""Decoding of tiles, and what encoder and decoder both compute from a model.

Everything before the entropy coder is float32 and may differ in the last bits between devices;
everything that the entropy *decoder* depends on is integer arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.allocation import BASE_LEVEL
from archive_pipeline.pcdc.bitstream import MODEL_BYTES, Header, UnknownModel, parse
from archive_pipeline.pcdc.constants import (
    BLOCK,
    FIRST_CODED_SCALE,
    HYPER_STRIDE,
    LEVEL_OFFSETS,
    SCALE_COUNT,
    STRIDE,
)
from archive_pipeline.pcdc.entropy import CorruptStream
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.parallel import each
from archive_pipeline.pcdc.transforms import expand_blocks, step_size


def grid(pixels: int, unit: int) -> int:
    """Number of units that cover so many pixels."""
    return -(-pixels // unit)


@dataclass
class Symbols:
    """What a stream says: header fields and integers, the same on every machine.

    Attributes:
        levels: uint8 (B_h, B_w) in 1..5.
        z: int64 (Z, ceil(h/64), ceil(w/64)).
        q: int64 (M, ceil(h/16), ceil(w/16)).
    """

    height: int
    width: int
    image_step: int
    levels: NDArray[np.uint8]
    z: NDArray[np.int64]
    q: NDArray[np.int64]


class Codec:
    """Decodes tiles of one model, several at once (see `parallel`); `encoding` makes them.

    Tiles are uint8 (height, width, 3) RGB with sides of 0..4096 pixels.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.prefix = bytes.fromhex(model.sha256)[:MODEL_BYTES]
        self.dtype = model.networks.prior.knots.dtype

    def decode_symbols(
        self, streams: list[bytes], max_height: int, max_width: int
    ) -> list[Symbols | CorruptStream]:
        """Entropy-decode streams, exactly; empty tiles have zero height and width.

        A stream that cannot be decoded yields its error in place of symbols, so that one bad
        tile does not hide others.

        Raises:
            UnknownModel: a stream was made by another model.
        """
        results: list[Symbols | CorruptStream | None] = [None] * len(streams)
        groups: dict[int, list[tuple[int, Header, bytes]]] = {}
        for t, stream in enumerate(streams):
            try:
                header, payload = parse(stream, max_height, max_width)
            except CorruptStream as error:
                results[t] = error
                continue
            if header.model != self.prefix:
                raise UnknownModel(f"stream was made by model {header.model.hex()}...")
            if header.empty:
                nothing = np.zeros((0, 0, 0), np.int64)
                results[t] = Symbols(0, 0, 0, np.zeros((0, 0), np.uint8), nothing, nothing)
            elif header.level_table >= self.model.level_tables:
                results[t] = CorruptStream("level table out of range")
            else:
                groups.setdefault(header.lanes_log2, []).append((t, header, payload))
        for lanes, members in groups.items():
            try:
                decoded: list = self._decode_group(members, 1 << lanes)
            except CorruptStream:
                # find out which: decode the group's tiles one by one
                decoded = []
                for member in members:
                    try:
                        decoded += self._decode_group([member], 1 << lanes)
                    except CorruptStream as error:
                        decoded.append(error)
            for (t, _, _), symbols in zip(members, decoded, strict=True):
                results[t] = symbols
        return results  # type: ignore[return-value]  # every place is filled by now

    def _decode_group(self, members: list[tuple[int, Header, bytes]], lanes: int) -> list[Symbols]:
        tables = self.model.tables
        config = self.model.networks.config
        headers = [h for _, h, _ in members]
        decoder = entropy.Decoder(tables, [p for _, _, p in members], lanes)

        shapes = [(grid(h.height, STRIDE), grid(h.width, STRIDE)) for h in headers]
        blocks = [(grid(a, BLOCK), grid(b, BLOCK)) for a, b in shapes]
        residuals = decoder.decode(
            [
                np.full(a * b, SCALE_COUNT + h.level_table)
                for h, (a, b) in zip(headers, blocks, strict=True)
            ]
        )
        levels = [
            levels_from_residuals(r.reshape(b)) for r, b in zip(residuals, blocks, strict=True)
        ]

        z_index = [
            self.z_index(h.image_step, grid(a, HYPER_STRIDE), grid(b, HYPER_STRIDE))
            for h, (a, b) in zip(headers, shapes, strict=True)
        ]
        z_coded = decoder.decode([i[i >= FIRST_CODED_SCALE] for i in z_index])
        z_scattered = []
        for index, coded in zip(z_index, z_coded, strict=True):
            z = np.zeros(index.shape, np.int64)
            z[index >= FIRST_CODED_SCALE] = coded
            z_scattered.append(z)
        # hyper-latents never escape, so scales can be had before the escapes are read
        q_index = each(
            lambda t: self.q_index(z_scattered[t], headers[t].image_step, levels[t])[
                :, : shapes[t][0], : shapes[t][1]
            ],
            range(len(members)),
            self.model.device,
        )
        q_coded = decoder.decode([i[i >= FIRST_CODED_SCALE] for i in q_index])
        used = decoder.finish()

        out = []
        for (_, h, payload), n, z, index, coded, level in zip(
            members, used, z_scattered, q_index, q_coded, levels, strict=True
        ):
            escaped = np.abs(coded) == tables.limit(index[index >= FIRST_CODED_SCALE])
            beyond = entropy.unpack_escapes(payload[n:], int(escaped.sum()))
            coded[escaped] += np.sign(coded[escaped]) * beyond
            q = np.zeros((config.latents, *index.shape[1:]), np.int64)
            q[index >= FIRST_CODED_SCALE] = coded
            out.append(Symbols(h.height, h.width, h.image_step, level, z, q))
        return out

    def synthesise(
        self, tiles: Sequence[Symbols], steps: int = 0, seeds: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Return the pixels of tiles, uint8 (height, width, 3).

        What a tile looks like depends neither on its company nor on the number of threads.

        Args:
            steps: 0 for the deterministic decoder, else denoising steps.
            seeds: of the tiles' noise; zeros if left out.

        Raises:
            ModelError: steps are asked for and the model has no denoiser.
        """
        if steps:
            self.model.denoiser()  # loaded here, not by several threads
        seeds = seeds or [0] * len(tiles)
        work = list(zip(tiles, seeds, strict=True))
        return each(lambda tile: self._synthesise(tile[0], steps, tile[1]), work, self.model.device)

    @torch.no_grad()
    def _synthesise(self, symbols: Symbols, steps: int, seed: int) -> NDArray[np.uint8]:
        if not symbols.height or not symbols.width:
            return np.zeros((symbols.height, symbols.width, 3), np.uint8)
        networks, device = self.model.networks, self.model.device
        h, w = symbols.q.shape[1:]
        z = torch.from_numpy(symbols.z)[None].to(device, self.dtype)
        step = torch.tensor([symbols.image_step], device=device)
        mean = networks.h_mean(z, step)[:, :, :h, :w]
        exponent = torch.from_numpy(self.exponents(symbols.image_step, symbols.levels, h, w))
        exponent = exponent.to(device)[None]
        q = torch.from_numpy(symbols.q)[None].to(device, self.dtype)
        y_hat = mean + step_size(exponent).to(self.dtype) * q
        x = networks.g_s(y_hat, exponent)
        if steps:
            from archive_pipeline.pcdc.denoiser import sample  # diffusers takes seconds

            x = sample(self.model.denoiser(), y_hat, exponent, x, steps, seed)
        x = x[0, :, : symbols.height, : symbols.width]
        pixels = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # + 127.5, and halves round up
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()

    def decode(
        self, streams: list[bytes], max_height: int, max_width: int, steps: int = 0, seed: int = 0
    ) -> list[NDArray[np.uint8]]:
        """Decode streams to uint8 (height, width, 3) tiles.

        Args:
            steps: 0 for the deterministic decoder, else denoising steps; their noise depends on
                `seed` and each tile's stream only.

        Raises:
            CorruptStream: naming the first bad stream by its position.
            UnknownModel: a stream was made by another model.
            ModelError: steps are asked for and the model has no denoiser.
        """
        tiles = []
        for t, symbols in enumerate(self.decode_symbols(streams, max_height, max_width)):
            if isinstance(symbols, CorruptStream):
                raise CorruptStream(f"tile {t} of {len(streams)}: {symbols}")
            tiles.append(symbols)
        return self.synthesise(tiles, steps, [tile_seed(s, seed) for s in streams])

    def z_index(self, image_step: int, height: int, width: int) -> NDArray[np.int64]:
        """Scale indices of hyper-latents (Z, height, width)."""
        with torch.no_grad():
            index = self.model.networks.prior(torch.tensor([image_step], device=self.model.device))
        column = index[0].cpu().numpy().astype(np.int64)
        return np.broadcast_to(column[:, None, None], (len(column), height, width))

    def level_map_bits(self, levels: NDArray[np.uint8]) -> float:
        """Bits that a tile's levels (B_h, B_w) take in its stream."""
        return float(self.level_table_bits(residuals_from_levels(levels).reshape(-1)).min())

    def level_table_bits(self, residuals: NDArray[np.int64]) -> NDArray[np.float64]:
        """Bits that residuals of levels (n,) take under each of the model's level tables."""
        tables = self.model.tables
        start = tables.start[SCALE_COUNT : SCALE_COUNT + self.model.level_tables]
        bits: NDArray[np.float64] = tables.bits[start[:, None] + residuals].sum(1)
        return bits

    def q_index(
        self, z: NDArray[np.int64], image_step: int, levels: NDArray[np.uint8] | None
    ) -> NDArray[np.int64]:
        """Scale indices (M, 4 z_h, 4 z_w) int64, shifted by the levels and clamped if given."""
        device = self.model.device
        index = self.model.networks.h_scale.indices(
            torch.from_numpy(np.ascontiguousarray(z))[None].to(device),
            torch.tensor([image_step], device=device),
        )
        base = index[0].cpu().numpy().astype(np.int64)
        if levels is None:
            return base
        offsets = self.exponents(0, levels, *base.shape[1:])
        h, w = offsets.shape[1:]
        base[:, :h, :w] = np.clip(base[:, :h, :w] - offsets, 0, SCALE_COUNT - 1)
        return base

    @staticmethod
    def exponents(
        image_step: int, levels: NDArray[np.uint8], height: int, width: int
    ) -> NDArray[np.int64]:
        """Step exponents (1, height, width) int64 of a tile's latents."""
        offsets = np.array(LEVEL_OFFSETS)[levels.astype(np.int64) - 1]
        spread = expand_blocks(torch.from_numpy(offsets)[None, None], height, width)
        return image_step + spread[0].numpy()


def tile_seed(stream: bytes, seed: int) -> int:
    """Seed of a tile's noise, 0..2^63 - 1: tiles differ, the same tile never does."""
    content = hashlib.sha256(stream).digest()
    return (int.from_bytes(content[:8], "little") + seed) % (1 << 63)


def residuals_from_levels(levels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Level map (B_h, B_w) in 1..5 to residuals mod 5 against the left (or upper) neighbour."""
    value = levels.astype(np.int64) - 1
    before = np.empty_like(value)
    before[:, 1:] = value[:, :-1]
    before[1:, 0] = value[:-1, 0]
    before[0, 0] = BASE_LEVEL - 1
    return (value - before) % len(LEVEL_OFFSETS)


def levels_from_residuals(residuals: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Reverse `residuals_from_levels`."""
    steps = residuals.copy()
    steps[:, 0] = np.cumsum(residuals[:, 0]) + BASE_LEVEL - 1
    return (np.cumsum(steps, 1) % len(LEVEL_OFFSETS) + 1).astype(np.uint8)
