"""Make a believable drone flight: JPEG frames with EXIF and DJI XMP, and an orthomosaic.

    python examples/make_flight.py OUT [--frames 4] [--width 5472 --height 3648] [--seed 0]

Frames and orthomosaic show one invented neighbourhood by the sea, placed in Galveston, Texas.  The
tags describe exactly how each frame was "taken", so overlapping frames georeference consistently.
The same seed makes the same ground; frames are rendered one by one, so memory does not grow with
the length of the flight.
"""

from __future__ import annotations

import argparse
import io
import math
import struct
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import rasterio
from PIL import Image
from PIL.TiffImagePlugin import IFDRational
from pyproj import Proj
from rasterio.transform import from_origin

Image8 = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
Color = tuple[int, int, int]

CRS = "EPSG:32615"
ORIGIN_LON, ORIGIN_LAT = -94.7960, 29.2845
ALTITUDE_M, TAKE_OFF_M = 80.0, 3.0
SENSOR_MM, FOCAL_MM, FOCAL_35MM = (13.2, 8.8), 8.8, 24
HEADING_DEG = 20.0
FRAMES_A_LANE = 6
FORWARD_OVERLAP, SIDE_OVERLAP = 0.75, 0.6

# The street grid, in metres; its axes are turned against north.
GRID_DEG = 24.0
BLOCK_M, STREET_M, LOT_M = (78.0, 58.0), 9.0, 17.0
COAST_V = -62.0
# Where the shadow of a point one metre up falls.
SHADOW = np.array([-0.55, 0.42])

ROOFS: tuple[Color, ...] = (
    (142, 128, 118), (118, 112, 110), (158, 98, 76), (170, 160, 148), (96, 92, 96), (186, 178, 170),
)  # fmt: skip
CARS: tuple[Color, ...] = (
    (232, 232, 230), (30, 32, 36), (150, 154, 158), (140, 30, 32), (40, 66, 120), (86, 90, 92),
)  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """One exposure: UTM position in metres, height above ground, and yaw against true north."""

    east: float
    north: float
    altitude: float
    yaw: float


class Ground:
    """The invented ground; any part of it can be rendered at any resolution."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        noise = np.random.default_rng(seed).normal(size=(512, 512))
        self.lattice = noise.astype(np.float32)

    def render(self, west: float, north: float, width: int, height: int, res: float) -> Image8:
        """Render a north-up part of the ground.

        Args:
            west, north: outer corner of the first pixel, metres from the origin.
            width, height: pixels.
            res: metres a pixel.

        Returns:
            uint8 (height, width, 3), RGB.
        """
        canvas = Canvas(west, north, width, height, res)
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) * [res, -res]
        u, v = _to_grid(corners + np.array([west, north])).T
        self._draw_land(canvas, u.min(), u.max(), v.min(), v.max())
        for top in range(0, height, 512):
            rows = slice(top, min(top + 512, height))
            self._texture(canvas, rows)
        return canvas.rgb

    def _draw_land(self, canvas: Canvas, u0: float, u1: float, v0: float, v1: float) -> None:
        margin = 25.0
        steps = np.arange(u0 - 60, u1 + 60, 1.0)
        # Streets are the bare canvas between blocks; sea and beach come last.
        blocks = [
            (i, j)
            for i in range(
                math.floor((u0 - margin) / BLOCK_M[0]), math.ceil((u1 + margin) / BLOCK_M[0])
            )
            for j in range(
                math.floor((v0 - margin) / BLOCK_M[1]), math.ceil((v1 + margin) / BLOCK_M[1])
            )
        ]
        for i, j in blocks:
            self._draw_marks(canvas, i, j)
        coast = _coast(steps)
        beyond = v0 - 200
        bands: tuple[tuple[float, tuple[float, float, float], int], ...] = (
            (26.0, (132, 134, 88), 90),
            (21.0, (168, 160, 116), 70),
            (15.0, (206, 190, 156), 34),
            (4.0, (190, 172, 138), 30),
            (2.2, (172, 152, 118), 24),
            (0.7, (212, 214, 204), 60),
            (0.0, (122, 138, 122), 36),
            *((-d, (108 - 2 * d, 126 - 1.4 * d, 114 - 0.8 * d), 22) for d in range(1, 25, 2)),
            (-27.0, (208, 212, 206), 70),
            (-27.6, (62, 94, 98), 18),
        )
        for shift, color, amplitude in bands:
            wobble = 0.7 * np.sin(steps / 3.1 + shift) + 0.4 * np.sin(steps / 1.3)
            edge = np.column_stack([steps, coast + shift + wobble * min(1.0, abs(shift) / 5 + 0.3)])
            ends = np.array([[steps[-1], beyond], [steps[0], beyond]])
            canvas.polygon(
                np.concatenate([edge, ends]), _color(np.array(color, dtype=np.float64)), amplitude
            )
        lots = [lot for i, j in blocks for lot in self._lots(i, j)]
        for draw in (self._draw_lot, self._draw_house, self._draw_trees):
            for lot in lots:
                draw(canvas, *lot)

    def _draw_marks(self, canvas: Canvas, i: int, j: int) -> None:
        """Draw the block's pavement and lawn, and the lines of the streets beside it."""
        u, v = i * BLOCK_M[0], j * BLOCK_M[1]
        half = STREET_M / 2
        block = _box(u + half, v + half, u + BLOCK_M[0] - half, v + BLOCK_M[1] - half)
        canvas.polygon(block, (176, 172, 164), 26)
        inner = _box(
            u + half + 1.6, v + half + 1.6, u + BLOCK_M[0] - half - 1.6, v + BLOCK_M[1] - half - 1.6
        )
        canvas.polygon(inner, (104, 122, 70), 100)
        for d in np.arange(8.0, BLOCK_M[0] - 8.0, 6.0):
            canvas.polygon(_box(u + d, v - 0.07, u + d + 3, v + 0.07), (206, 190, 120), 20)
        for d in np.arange(8.0, BLOCK_M[1] - 8.0, 6.0):
            canvas.polygon(_box(u - 0.07, v + d, u + 0.07, v + d + 3), (206, 190, 120), 20)
        rng = self._rng(i, j, 7)
        for joint in np.arange(half + 2, BLOCK_M[0] - half, 2.0):
            canvas.line(
                np.array([[u + joint, v + half], [u + joint, v + half + 1.6]]),
                (148, 144, 138),
                0.03,
            )
        for _ in range(9):
            start = np.array([u, v]) + rng.uniform(-0.5, 0.5, 2) * [BLOCK_M[0], STREET_M]
            crack = start + np.cumsum(rng.normal(0, 0.5, (8, 2)), axis=0)
            canvas.line(crack, (82, 82, 86), 0.04)
        hole = np.array([u + rng.uniform(10, 60), v + rng.uniform(-2, 2)])
        canvas.circle(hole, 0.35, (74, 72, 72), 30)
        for slot in rng.choice(8, rng.integers(2, 6), replace=False):
            along = 9 + 7.5 * slot + rng.uniform(0, 1.5)
            self._draw_car(canvas, rng, u + along, v + half - 1.3, 0.0)

    def _lots(self, i: int, j: int) -> list[tuple[float, float, int, int, int, int]]:
        """Return (u, v, facing, i, j, number) of a block's lots that are clear of the beach."""
        count = int((BLOCK_M[0] - STREET_M - 3) // LOT_M)
        found = []
        for row in (0, 1):
            for k in range(count):
                u = i * BLOCK_M[0] + STREET_M / 2 + 1.6 + (k + 0.5) * LOT_M
                v = j * BLOCK_M[1] + (
                    STREET_M / 2 + 1.6 if row == 0 else BLOCK_M[1] - STREET_M / 2 - 1.6
                )
                facing = 1 if row == 0 else -1
                if v - 12 + facing * 12 > float(_coast(np.array([u]))[0]) + 26:
                    found.append((u, v, facing, i, j, 2 * k + row))
        return found

    def _draw_lot(self, c: Canvas, u: float, v: float, f: int, i: int, j: int, n: int) -> None:
        rng = self._rng(i, j, 100 + n)
        depth = (BLOCK_M[1] - STREET_M) / 2 - 1.6
        warm = rng.normal(0, 8) * np.array([1.0, 0.2, 0.1])
        tint = rng.normal(0, 3, 3) + rng.normal(0, 9) + warm
        lawn = np.asarray(np.array([112.0, 128.0, 74.0]) + tint, dtype=np.float64)
        c.polygon(_box(u - LOT_M / 2, v, u + LOT_M / 2, v + f * depth), _color(lawn), 105)
        side = rng.choice([-1, 1])
        drive = u + side * (LOT_M / 2 - 2.4)
        c.polygon(_box(drive - 1.5, v - f * 1.6, drive + 1.5, v + f * 10), (186, 180, 170), 26)
        c.polygon(_box(u - 0.5, v, u + 0.5, v + f * 7), (178, 172, 164), 26)
        if rng.random() < 0.6:
            self._draw_car(c, rng, drive + 0.95, v + f * 5.5 - 2.3, 90.0)
        if rng.random() < 0.25:
            pool = np.array([u - side * 3, v + f * (depth - 4)])
            c.polygon(
                _box(pool[0] - 3.4, pool[1] - 2.4, pool[0] + 3.4, pool[1] + 2.4),
                (204, 198, 188),
                20,
            )
            c.polygon(
                _box(pool[0] - 2.6, pool[1] - 1.6, pool[0] + 2.6, pool[1] + 1.6), (92, 178, 196), 12
            )
        fence = _box(u - LOT_M / 2 - 0.06, v + f * 9, u - LOT_M / 2 + 0.06, v + f * depth)
        c.shadow(fence + _to_grid(SHADOW * 1.6) * 0.5)
        c.polygon(fence, (150, 128, 100), 30)

    def _draw_house(self, c: Canvas, u: float, v: float, f: int, i: int, j: int, n: int) -> None:
        rng = self._rng(i, j, 200 + n)
        if rng.random() < 0.06:
            return
        wide, deep = rng.uniform(8.5, 10.8), rng.uniform(8.5, 12.0)
        low, high = 3.0, rng.uniform(4.8, 6.2)
        left = u - wide / 2 + rng.uniform(-1.6, 0.6)
        front = v + f * rng.uniform(6.0, 7.5)
        color = np.array(ROOFS[rng.integers(len(ROOFS))]) + rng.normal(0, 6, 3)
        self._draw_roof(c, rng, left, front, wide, f * deep, low, high, color)
        if rng.random() < 0.45:
            self._draw_roof(c, rng, left + rng.uniform(0, wide - 5), front - f * 2.5, 5.0, f * 5.0,
                            low - 0.2, high - 0.9, color)  # fmt: skip
        if rng.random() < 0.4:
            shed = front + f * (deep + 4)
            self._draw_roof(c, rng, left - 0.5, shed, 3.0, f * 2.6, 2.0, 2.5, color * 0.9 + 14)

    def _draw_roof(
        self, c: Canvas, rng: np.random.Generator, u: float, v: float, wide: float, deep: float,
        low: float, high: float, color: Points,
    ) -> None:  # fmt: skip
        """Draw a hipped or gabled roof with its shadow; the sun stands in the south-east."""
        base = _box(u, v, u + wide, v + deep)
        inset = rng.choice([0.0, 0.35]) * min(wide, abs(deep))
        if wide > abs(deep):
            ridge = np.array([[u + inset, v + deep / 2], [u + wide - inset, v + deep / 2]])
        else:
            ridge = np.array([[u + wide / 2, v + math.copysign(inset, deep)],
                              [u + wide / 2, v + deep - math.copysign(inset, deep)]])  # fmt: skip
        shade = np.concatenate(
            [base, base + _to_grid(SHADOW * low), ridge + _to_grid(SHADOW * high)]
        )
        c.shadow(cv2.convexHull(shade.astype(np.float32))[:, 0].astype(np.float64))
        if wide > abs(deep):
            faces = [[base[0], base[1], ridge[1], ridge[0]], [base[2], base[3], ridge[0], ridge[1]],
                     [base[1], base[2], ridge[1]], [base[3], base[0], ridge[0]]]  # fmt: skip
        else:
            faces = [[base[1], base[2], ridge[1], ridge[0]], [base[3], base[0], ridge[0], ridge[1]],
                     [base[0], base[1], ridge[0]], [base[2], base[3], ridge[1]]]  # fmt: skip
        centre = base.mean(axis=0)
        for face in faces:
            corners = np.array(face)
            outward = corners.mean(axis=0) - centre
            # A face is the brighter the more it leans towards the sun.
            light = -float(outward @ _to_grid(SHADOW)) / (np.linalg.norm(outward) + 1e-6) / 0.69
            c.polygon(corners, _color(color * (1.0 + 0.2 * light)), 42)
            # Courses of shingles run along the eaves.
            courses = max(2, int(np.linalg.norm(corners[-1] - corners[0]) / 0.6))
            for t in np.arange(1, courses) / courses:
                line = [
                    corners[0] + t * (corners[-1] - corners[0]),
                    corners[1] + t * (corners[2] - corners[1]),
                ]
                c.line(np.array(line), _color(color * (0.93 + 0.19 * light)), 0.05)
        c.line(ridge, _color(color * 1.18), 0.14)
        for _ in range(rng.integers(1, 4)):
            vent = centre + rng.uniform(-0.3, 0.3, 2) * [wide, abs(deep)]
            c.shadow(_box(*vent, *(vent + 0.35)) + _to_grid(SHADOW * 0.5))
            c.polygon(_box(*vent, *(vent + 0.35)), (206, 204, 200), 10)

    def _draw_trees(self, c: Canvas, u: float, v: float, f: int, i: int, j: int, n: int) -> None:
        rng = self._rng(i, j, 300 + n)
        depth = (BLOCK_M[1] - STREET_M) / 2 - 2
        for _ in range(rng.integers(1, 5)):
            back = rng.random() < 0.75
            inward = rng.uniform(0.82, 1.0) * depth if back else rng.uniform(1, 4)
            at = np.array([u + rng.uniform(-0.5, 0.5) * LOT_M, v + f * inward])
            radius = rng.uniform(0.8, 3.2) if back else rng.uniform(0.7, 1.9)
            self._draw_tree(c, rng, at, radius)

    def _draw_tree(self, c: Canvas, rng: np.random.Generator, at: Points, radius: float) -> None:
        tone = np.array([74, 92, 48]) + rng.normal(0, 8, 3)
        count = int(14 + 16 * radius)
        angle, reach = rng.uniform(0, 2 * np.pi, count), radius * np.sqrt(rng.random(count)) * 0.9
        leaves = np.column_stack([np.cos(angle), np.sin(angle)]) * reach[:, None]
        sizes = radius * rng.uniform(0.16, 0.4, count)
        fall = _to_grid(SHADOW * radius * 1.9)
        for leaf, size in zip(leaves, sizes, strict=True):
            c.shadow_circle(at + leaf + fall, size * 1.1)
        sun = -_to_grid(SHADOW) / 0.69
        # From the shaded to the sunny side, so that lit clumps lie on top.
        lit = leaves @ sun / radius
        for k in np.argsort(lit):
            color = tone * (0.72 + 0.3 * lit[k] + 0.12 * rng.random())
            c.circle(at + leaves[k], sizes[k], _color(color + rng.normal(0, 4)), 120)

    def _draw_car(
        self, c: Canvas, rng: np.random.Generator, u: float, v: float, angle: float
    ) -> None:
        length, width = rng.uniform(4.1, 5.0), rng.uniform(1.75, 1.95)
        color = np.array(CARS[rng.integers(len(CARS))], dtype=np.float64)
        turn = math.radians(angle + rng.normal(0, 2.0))
        axes = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

        def part(x0: float, y0: float, x1: float, y1: float) -> Points:
            box = _box(x0 * length, y0 * width, x1 * length, y1 * width)
            return np.asarray(box @ axes + [u, v])

        c.shadow(part(0, 0, 1, 1) + _to_grid(SHADOW * 1.3))
        body = part(0.02, 0.06, 0.98, 0.94)
        c.polygon(body, _color(color), 8)
        c.polygon(part(0, 0.2, 1, 0.8), _color(color), 8)
        c.polygon(part(0.24, 0.1, 0.78, 0.9), (38, 44, 50), 8)
        c.polygon(part(0.36, 0.12, 0.68, 0.88), _color(color * 0.96 + 6), 8)

    def _texture(self, canvas: Canvas, rows: slice) -> None:
        """Lay noise and shadows over a strip of the drawn surfaces."""
        height, width = canvas.shade[rows].shape
        shape = height, width
        top = canvas.north - rows.start * canvas.res
        broad = np.zeros(shape, dtype=np.float32)
        for scale, weight in ((38.0, 0.5), (11.0, 0.5), (3.4, 0.4)):
            broad += weight * self.noise(canvas.west, top, shape, canvas.res, scale)
        fine = np.zeros(shape, dtype=np.float32)
        for scale, weight in ((1.1, 0.3), (0.33, 0.45), (0.11, 0.6), (0.045, 0.8)):
            if scale > canvas.res:
                fine += weight * self.noise(canvas.west, top, shape, canvas.res, scale)
        amplitude = canvas.amplitude[rows].astype(np.float32) / 255.0
        sun = 1.0 - cv2.GaussianBlur(canvas.shade[rows], (0, 0), 1.2).astype(np.float32) * (
            0.6 / 255
        )
        gain = (1.0 + amplitude * (0.55 * fine + 0.30 * broad)) * sun
        # Lush and dry places: grass goes from green to straw, and shadows are bluer than sunlight.
        dry = 0.25 * amplitude * broad
        for band, warm in enumerate((1.0, 0.45, -0.2)):
            tinted = gain * (1.0 + warm * dry) * (1.0 + (band - 1) * 0.08 * (1.0 - sun))
            strip = canvas.rgb[rows, :, band]
            canvas.rgb[rows, :, band] = np.clip(strip * tinted + 0.5, 0, 255)

    def noise(
        self, west: float, north: float, shape: tuple[int, int], res: float, scale: float
    ) -> npt.NDArray[np.float32]:
        """Smooth noise with features of ``scale`` metres, fixed to the ground."""
        height, width = shape
        x, y = west / scale, -north / scale
        col, row = math.floor(x) - 2, math.floor(y) - 2
        cols = np.arange(col, col + width * res / scale + 6).astype(int) % 512
        rows = (np.arange(row, row + height * res / scale + 6).astype(int) + int(scale * 97)) % 512
        step = res / scale
        matrix = np.array([[step, 0, x - col + step / 2], [0, step, y - row + step / 2]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        patch = self.lattice[np.ix_(rows, cols)]
        noise = cv2.warpAffine(patch, matrix, (width, height), flags=flags)
        return np.asarray(noise, dtype=np.float32)

    def _rng(self, i: int, j: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, i + 10_000, j + 10_000, what])


class Canvas:
    """Colour, roughness and shadow of a part of the ground, drawn in grid metres."""

    def __init__(self, west: float, north: float, width: int, height: int, res: float) -> None:
        self.west, self.north, self.res = west, north, res
        self.rgb = np.empty((height, width, 3), dtype=np.uint8)
        self.rgb[:] = (112, 112, 114)
        self.amplitude = np.full((height, width), 34, dtype=np.uint8)
        self.shade = np.zeros((height, width), dtype=np.uint8)

    def polygon(self, points: Points, color: Color, amplitude: int) -> None:
        """Fill a polygon; what lies there is no longer in shadow."""
        pixels = self._pixels(points)
        if pixels is not None:
            cv2.fillPoly(self.rgb, [pixels], color, cv2.LINE_AA, 4)
            cv2.fillPoly(self.amplitude, [pixels], (amplitude,), cv2.LINE_8, 4)
            cv2.fillPoly(self.shade, [pixels], (0,), cv2.LINE_8, 4)

    def shadow(self, points: Points) -> None:
        """Put a polygon in shadow."""
        pixels = self._pixels(points)
        if pixels is not None:
            cv2.fillPoly(self.shade, [pixels], (255,), cv2.LINE_8, 4)

    def circle(self, centre: Points, radius: float, color: Color, amplitude: int) -> None:
        """Fill a circle; what lies there is no longer in shadow."""
        pixel = self._pixels(centre[None])
        if pixel is not None:
            place, size = tuple(pixel[0].tolist()), max(8, int(radius / self.res * 16))
            cv2.circle(self.rgb, place, size, color, -1, cv2.LINE_AA, 4)
            cv2.circle(self.amplitude, place, size, (amplitude,), -1, cv2.LINE_8, 4)
            cv2.circle(self.shade, place, size, (0,), -1, cv2.LINE_8, 4)

    def shadow_circle(self, centre: Points, radius: float) -> None:
        """Put a circle in shadow."""
        pixel = self._pixels(centre[None])
        if pixel is not None:
            size = max(8, int(radius / self.res * 16))
            cv2.circle(self.shade, tuple(pixel[0].tolist()), size, (255,), -1, cv2.LINE_8, 4)

    def line(self, points: Points, color: Color, width: float) -> None:
        """Draw a line of ``width`` metres; thinner than half a pixel it is left out."""
        pixels = self._pixels(points)
        if pixels is not None and width > 0.5 * self.res:
            thick = max(1, round(width / self.res))
            cv2.polylines(self.rgb, [pixels], False, color, thick, cv2.LINE_AA, 4)

    def _pixels(self, points: Points) -> npt.NDArray[np.int32] | None:
        """Grid metres to pixels in 1/16; ``None`` for what is well outside."""
        turned = (_from_grid(points) - [self.west, self.north]) / [self.res, -self.res] - 0.5
        limit, margin = np.array(self.rgb.shape[1::-1]), 3.0 / self.res
        if (turned.max(axis=0) < -margin).any() or (turned.min(axis=0) > limit + margin).any():
            return None
        return np.asarray(np.round(turned * 16), dtype=np.int32)


def make_flight(
    out: Path | str, frames: int = 4, width: int = 5472, height: int = 3648, seed: int = 0
) -> list[Path]:
    """Write a flight: ``DJI_0001.JPG`` and so on, and ``orthomosaic.tif``.

    Args:
        out: folder, made if need be.
        frames: number of frames, at least 1.
        width: of the frames, pixels; the field of view is that of the largest crop of the sensor.
        height: of the frames, pixels.
        seed: of the ground and of the flight's unsteadiness.

    Returns:
        The paths, frames first.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    ground = Ground(seed)
    utm = Proj(CRS)
    origin = np.array(utm(ORIGIN_LON, ORIGIN_LAT))
    pitch = min(SENSOR_MM[0] / width, SENSOR_MM[1] / height) / FOCAL_MM
    shots = _plan(frames, width * pitch, height * pitch, origin, seed)
    paths = []
    for index, shot in enumerate(shots):
        image = _expose(ground, shot, width, height, pitch, utm, origin, seed + index)
        path = folder / f"DJI_{index + 1:04d}.JPG"
        _save_frame(path, image, shot, index, utm)
        paths.append(path)
    return [*paths, _save_orthomosaic(folder / "orthomosaic.tif", ground, shots, pitch, origin)]


def _plan(count: int, tan_x: float, tan_y: float, origin: Points, seed: int) -> list[Shot]:
    """Lanes there and back, a little off course and off level as real ones are."""
    rng = np.random.default_rng([seed, 1])
    heading = math.radians(HEADING_DEG)
    ahead = np.array([math.sin(heading), math.cos(heading)])
    aside = np.array([math.cos(heading), -math.sin(heading)])
    step, lane_step = (
        ALTITUDE_M * tan_y * (1 - FORWARD_OVERLAP),
        ALTITUDE_M * tan_x * (1 - SIDE_OVERLAP),
    )
    shots = []
    for index in range(count):
        lane, place = divmod(index, FRAMES_A_LANE)
        place = place if lane % 2 == 0 else FRAMES_A_LANE - 1 - place
        at = (
            origin
            + ahead * (place * step - 35.0)
            + aside * lane * lane_step
            + rng.normal(0, 0.8, 2)
        )
        yaw = HEADING_DEG + 180.0 * (lane % 2) + rng.normal(0, 1.2)
        yaw = round((yaw + 180.0) % 360.0 - 180.0, 1)
        altitude = round(ALTITUDE_M + rng.normal(0, 0.2), 2)
        shots.append(Shot(float(at[0]), float(at[1]), altitude, yaw))
    return shots


def _expose(
    ground: Ground, shot: Shot, width: int, height: int, pitch: float, utm: Proj, origin: Points,
    seed: int,
) -> Image8:  # fmt: skip
    """Take a picture straight down: uint8 (height, width, 3)."""
    lon, lat = utm(shot.east, shot.north, inverse=True)
    factors = utm.get_factors(lon, lat)
    # Grid north lies east of true north by the convergence.
    yaw = math.radians(shot.yaw - factors.meridian_convergence)
    gsd = pitch * shot.altitude * factors.meridional_scale
    right = np.array([math.cos(yaw), -math.sin(yaw)]) * gsd
    down = np.array([-math.sin(yaw), -math.cos(yaw)]) * gsd
    first = np.array([shot.east, shot.north]) - origin - right * width / 2 - down * height / 2
    corners = first + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) @ np.array(
        [right * width, down * height]
    )
    res = pitch * ALTITUDE_M
    # On one lattice for all frames, so that they share the noise of the ground.
    west, south = np.floor(corners.min(axis=0) / res - 2) * res
    east, north = np.ceil(corners.max(axis=0) / res + 2) * res
    size = round((east - west) / res), round((north - south) / res)
    base = ground.render(west, north, *size, res)
    # Pixel centres of the frame to pixel centres of the rendered ground.
    step = np.column_stack([right, down]) / [[res], [-res]]
    offset = (first - [west, north]) / [res, -res] + step @ [0.5, 0.5] - 0.5
    matrix = np.column_stack([step, offset])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(base, matrix, (width, height), flags=flags)
    rng = np.random.default_rng([seed, 2])
    grain = rng.normal(0, 2.2, (256, 256, 1)).astype(np.float32)
    reps = -(-height // 256), -(-width // 256), 1
    y, x = np.ogrid[-0.6 : 0.6 : height * 1j, -0.8 : 0.8 : width * 1j]
    falloff = (1.02 - 0.10 * (x * x + y * y)).astype(np.float32)
    out = np.empty_like(image)
    for band in range(3):
        noise = np.tile(np.roll(grain, 37 * band, axis=0)[..., 0], reps[:2])[:height, :width]
        out[..., band] = np.clip(image[..., band] * falloff + noise + 0.5, 0, 255)
    return np.asarray(out, dtype=np.uint8)


def _save_frame(path: Path, image: Image8, shot: Shot, index: int, utm: Proj) -> None:
    lon, lat = utm(shot.east, shot.north, inverse=True)
    when = datetime(2024, 9, 12, 10, 30) + timedelta(seconds=3 * index)
    stamp = when.strftime("%Y:%m:%d %H:%M:%S")
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "DJI", "FC6310"
    exif[0x0112], exif[0x0131], exif[0x0132] = 1, "v01.09.1719", stamp
    exif.get_ifd(0x8769).update(
        {
            0x829A: IFDRational(1, 1000), 0x829D: IFDRational(45, 10), 0x8827: 100,
            0x9003: stamp, 0x9004: stamp, 0x920A: IFDRational(88, 10),
            0xA002: image.shape[1], 0xA003: image.shape[0], 0xA405: FOCAL_35MM,
        }
    )  # fmt: skip
    exif.get_ifd(0x8825).update(
        {
            0: b"\x02\x03\x00\x00", 1: "N" if lat >= 0 else "S", 2: _dms(lat),
            3: "E" if lon >= 0 else "W", 4: _dms(lon),
            5: b"\x00", 6: IFDRational(round((shot.altitude + TAKE_OFF_M) * 1000), 1000),
        }
    )  # fmt: skip
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'rdf:about="DJI Meta Data" xmlns:drone-dji="http://www.dji.com/drone-dji/1.0/" '
        f'drone-dji:AbsoluteAltitude="{shot.altitude + TAKE_OFF_M:+.2f}" '
        f'drone-dji:RelativeAltitude="{shot.altitude:+.2f}" '
        'drone-dji:GimbalRollDegree="+0.00" '
        f'drone-dji:GimbalYawDegree="{shot.yaw:+.2f}" drone-dji:GimbalPitchDegree="-90.00" '
        f'drone-dji:FlightRollDegree="+1.20" drone-dji:FlightYawDegree="{shot.yaw + 0.7:+.2f}" '
        'drone-dji:FlightPitchDegree="-4.10"/></rdf:RDF></x:xmpmeta>'
    )
    picture = Image.fromarray(image)
    picture.save(
        path, "JPEG", quality=95, subsampling="4:2:2", exif=_with_thumbnail(exif, picture),
        xmp=xmp.encode(),
    )  # fmt: skip


def _dms(degrees: float) -> tuple[IFDRational, IFDRational, IFDRational]:
    whole, rest = divmod(abs(degrees) * 3600, 3600)
    minutes, seconds = divmod(rest, 60)
    return (
        IFDRational(int(whole), 1),
        IFDRational(int(minutes), 1),
        IFDRational(round(seconds * 10000), 10000),
    )


def _with_thumbnail(exif: Image.Exif, picture: Image.Image) -> bytes:
    """Append the second directory with a JPEG thumbnail, as cameras write it."""
    small = picture.copy()
    small.thumbnail((160, 120))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    block = bytearray(exif.tobytes())
    # Offsets count from the TIFF header, behind the six bytes "Exif\0\0".
    order = "<" if block[6:8] == b"II" else ">"
    first = struct.unpack_from(order + "I", block, 10)[0] + 6
    link = first + 2 + 12 * struct.unpack_from(order + "H", block, first)[0]
    block += bytes(len(block) % 2)
    second = len(block) - 6
    struct.pack_into(order + "I", block, link, second)
    start = second + 2 + 3 * 12 + 4
    block += struct.pack(order + "H", 3)
    block += struct.pack(order + "HHIHH", 0x0103, 3, 1, 6, 0)
    block += struct.pack(order + "HHII", 0x0201, 4, 1, start)
    block += struct.pack(order + "HHII", 0x0202, 4, 1, buffer.getbuffer().nbytes)
    block += struct.pack(order + "I", 0) + buffer.getvalue()
    return bytes(block)


def _save_orthomosaic(
    path: Path, ground: Ground, shots: list[Shot], pitch: float, origin: Points
) -> Path:
    """Write a tiled GeoTIFF of what the frames see, with a mask for its ragged edge."""
    centres = np.array([[shot.east, shot.north] for shot in shots]) - origin
    res = round(pitch * ALTITUDE_M * 4, 3)
    west, south = np.floor(centres.min(axis=0) - 60.0)
    east, north = np.ceil(centres.max(axis=0) + 60.0)
    width, height = round((east - west) / res), round((north - south) / res)
    rgb = ground.render(west, north, width, height, res)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    wobble = ground.noise(west, north, (height, width), res, 9.0)
    reach = np.hypot((x / width - 0.5) * 2.1, (y / height - 0.5) * 2.1) + 0.04 * wobble
    mask = np.where(reach < 1.0, 255, 0).astype(np.uint8)
    rgb[mask == 0] = 0
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": 3, "dtype": "uint8",
        "crs": CRS, "transform": from_origin(origin[0] + west, origin[1] + north, res, res),
        "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate",
        "photometric": "rgb", "interleave": "pixel",
    }  # fmt: skip
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as target:
        target.write(np.moveaxis(rgb, -1, 0))
        target.write_mask(mask)
        target.update_tags(TIFFTAG_SOFTWARE="make_flight")
    return path


def _turn() -> Points:
    angle = math.radians(GRID_DEG)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


TURN = _turn()


def _to_grid(points: Points) -> Points:
    return np.asarray(points @ TURN.T)


def _from_grid(points: Points) -> Points:
    return np.asarray(points @ TURN)


def _coast(u: Points) -> Points:
    return np.asarray(COAST_V + 5.0 * np.sin(u / 31.0) + 2.5 * np.sin(u / 11.0 + 1.0))


def _box(u0: float, v0: float, u1: float, v1: float) -> Points:
    return np.array([[u0, v0], [u1, v0], [u1, v1], [u0, v1]], dtype=np.float64)


def _color(values: Points) -> Color:
    red, green, blue = np.clip(values, 0, 255).astype(int).tolist()
    return red, green, blue


def main() -> None:
    """Make a flight from the command line."""
    parser = argparse.ArgumentParser(description="Make a believable drone flight.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--width", type=int, default=5472)
    parser.add_argument("--height", type=int, default=3648)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in make_flight(args.out, args.frames, args.width, args.height, args.seed):
        print(path)


if __name__ == "__main__":
    main()
