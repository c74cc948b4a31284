"""A second decoder of PCDC tile streams, written from format.md: NumPy and the standard library.

    python docs/reference_decoder.py MODEL_FOLDER STREAM > pixels.ppm

It shares no code with the package, is slow and plain, and shows that a stream can be read without
PyTorch, Zarr or this project. Symbols are exact; pixels are computed in float64 and may differ by
one level from those of a float32 decoder. Section numbers are those of format.md.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

OFFSETS = np.array([8, 4, 0, -4, -8])  # of levels 1..5
FIRST_CODED = 10
SCALES = 80


# ------------------------------------------------------------------------- section 2: model files


def read_model(folder):
    """Configuration, tensors by name (float64 or int64) and SHA-256 of a model folder."""
    names = ["config.json", "model.safetensors"]
    denoiser = ["denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors"]
    names += denoiser if (Path(folder) / denoiser[0]).exists() else []
    files = {name: (Path(folder) / name).read_bytes() for name in names}
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    config = {"edge_kernel": 1, "shortcut": 0, **json.loads(files["config.json"])}
    return config, read_safetensors(files["model.safetensors"]), total.hexdigest()


def read_safetensors(data):
    """Tensors by name; the file is a length, a JSON header and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    types = {"F32": "<f4", "F16": "<f2", "I32": "<i4"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(
                data[8 + length + first : 8 + length + last], types[entry["dtype"]]
            )
            wide = np.int64 if entry["dtype"] == "I32" else np.float64
            tensors[name] = values.astype(wide).reshape(entry["shape"])
    return tensors


# --------------------------------------------------------------------------- sections 3 to 5: rANS


class Coder:
    """The states and words of one stream."""

    def __init__(self, tensors, payload, lanes):
        sizes, self.frequency = tensors["tables.size"], tensors["tables.frequency"]
        self.zero = tensors["tables.zero"]
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        self.state = [int.from_bytes(payload[5 * i : 5 * i + 5], "little") for i in range(lanes)]
        self.payload, self.position = payload, 5 * lanes

    def phase(self, tables):
        """Symbols of one phase, from the table of each."""
        lanes, out = len(self.state), []
        for first in range(0, len(tables), lanes):
            some = tables[first : first + lanes]
            for lane, table in enumerate(some):
                low, high = self.start[table], self.start[table + 1]
                frequency = self.frequency[low:high]
                before = np.concatenate([[0], np.cumsum(frequency)])
                slot = self.state[lane] & 0x3FFF
                entry = int(np.searchsorted(before, slot, "right")) - 1
                self.state[lane] = (
                    int(frequency[entry]) * (self.state[lane] >> 14) + slot - int(before[entry])
                )
                out.append(entry - int(self.zero[table]))
            for lane in range(len(some)):  # words are taken in the order of the lanes
                if self.state[lane] < 1 << 24:
                    word = self.payload[self.position : self.position + 2]
                    if len(word) < 2:
                        raise ValueError("the stream ends early")
                    self.state[lane] = self.state[lane] << 16 | int.from_bytes(word, "little")
                    self.position += 2
        return np.array(out, np.int64)


def leb128(data):
    """Unsigned numbers of seven bits a byte, the lowest first."""
    values, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value)
            value = shift = 0
    return values


# -------------------------------------------------------------- section 6: scales, integers only


def prior(tensors, step):
    """Table of each channel of z at an image step."""
    knots = np.rint(tensors["prior.knots"] * 1024).astype(np.int64)
    low, part = divmod(step, 8)
    return np.clip(((8 - part) * knots[:, low] + part * knots[:, low + 1] + 256) >> 9, 0, 79)


def scale_network(tensors, z, step):
    """Scale indices (M, 4h, 4w) of hyper-latents z (Z, h, w), before the levels shift them."""
    x = np.concatenate([z * 16, np.full((1, *z.shape[1:]), 2 * step)])
    for i, (shift, ceiling) in enumerate([(8, 4095)] * 5 + [(9, 255)]):
        weight = np.rint(tensors[f"h_scale.layers.{i}.weight"] * 256).astype(np.int64)
        bias = np.rint(tensors[f"h_scale.layers.{i}.bias"] * 4096).astype(np.int64)
        total = convolve(x, weight, bias)
        x = np.clip((total + (1 << (shift - 1))) >> shift, 0, ceiling)
        if i in (1, 3):
            x = shuffle(x, 2)
    return x - step


def convolve(x, weight, bias, groups=1):
    """Convolution of (C, h, w) with zeros outside; kernels of 1 or 3, groups 1 or C."""
    k = weight.shape[-1]
    h, w = x.shape[1:]
    padded = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2)])
    total = np.zeros((len(weight), h, w), x.dtype) + bias[:, None, None]
    for i in range(k):
        for j in range(k):
            part = padded[:, i : i + h, j : j + w]
            if groups == 1:
                total += np.tensordot(weight[:, :, i, j], part, 1)
            else:
                total += weight[:, 0, i, j, None, None] * part
    return total


def shuffle(x, r):
    """(C r r, h, w) to (C, r h, r w): channel c r r + i r + j is row i, column j of a cell."""
    c, h, w = x.shape
    cells = x.reshape(c // r**2, r, r, h, w)
    return cells.transpose(0, 3, 1, 4, 2).reshape(c // r**2, h * r, w * r)


# ------------------------------------------------------------------- section 7: from symbols to y


def decode_symbols(stream, config, tensors, sha256):
    """Height, width, image step, levels, z and q of a stream."""
    if stream[0] != 1 or stream[1:9] != bytes.fromhex(sha256)[:8]:
        raise ValueError("another format or another model")
    height, width = (int.from_bytes(stream[i : i + 2], "little") for i in (9, 11))
    if not height or not width:
        return 0, 0, 0, None, None, None
    step, packed = stream[13], stream[14]
    coder = Coder(tensors, stream[15:], 1 << (packed & 15))

    h, w = -(-height // 16), -(-width // 16)
    rows, columns = -(-h // 2), -(-w // 2)
    residuals = coder.phase(np.full(rows * columns, SCALES + (packed >> 4)))
    levels = np.zeros((rows, columns), np.int64)
    for k, residual in enumerate(residuals):
        r, c = divmod(k, columns)
        before = levels[r, c - 1] if c else levels[r - 1, 0] if r else 3
        levels[r, c] = (before - 1 + residual) % 5 + 1

    z_tables = prior(tensors, step)
    z = np.zeros((len(z_tables), -(-h // 4), -(-w // 4)), np.int64)
    coded = np.broadcast_to(z_tables[:, None, None], z.shape)
    z[coded >= FIRST_CODED] = coder.phase(coded[coded >= FIRST_CODED])

    offsets = np.kron(OFFSETS[levels - 1], np.ones((2, 2), np.int64))[:h, :w]
    index = scale_network(tensors, z, step)[:, :h, :w]
    index = np.clip(index - offsets, 0, SCALES - 1)
    q = np.zeros((config["latents"], h, w), np.int64)
    tables = index[index >= FIRST_CODED]
    symbols = coder.phase(tables)
    if any(state != 1 << 24 for state in coder.state):
        raise ValueError("the coder does not end where encoders start")
    escaped = np.abs(symbols) == tensors["tables.zero"][tables]
    beyond = np.array(leb128(coder.payload[coder.position :]), np.int64)
    symbols[escaped] += np.sign(symbols[escaped]) * beyond
    q[index >= FIRST_CODED] = symbols
    return height, width, step, levels, z, q


# ------------------------------------------------------------------------------ section 8: pixels


def layer(tensors, name, x, groups=1):
    return convolve(x, tensors[name + ".weight"], tensors[name + ".bias"], groups)


def leaky(x):
    return np.where(x < 0, 0.1 * x, x)


def block(tensors, name, x):
    """A residual block: depthwise 3 x 3 between two 1 x 1, then a pair of 1 x 1."""
    y = leaky(layer(tensors, f"{name}.spatial.0", x))
    y = layer(tensors, f"{name}.spatial.2", y, groups=len(y))
    x = x + layer(tensors, f"{name}.spatial.3", y)
    return x + layer(tensors, f"{name}.mix.2", leaky(layer(tensors, f"{name}.mix.0", x)))


def network(tensors, name, x, parts):
    """A chain of layers numbered from 0: "conv", "block", or the factor of a pixel shuffle."""
    for i, part in enumerate(parts):
        if part == "conv":
            x = layer(tensors, f"{name}.{i}", x)
        elif part == "block":
            x = block(tensors, f"{name}.{i}", x)
        else:
            x = shuffle(x, part)
    return x


def synthesise(config, tensors, height, width, step, levels, z, q):
    """Pixels uint8 (height, width, 3)."""
    h, w = q.shape[1:]
    plane = np.full((1, *z.shape[1:]), step / 63)
    chain = ["conv", "conv", 2, "block", "conv", 2, "block", "conv"]
    mean = network(tensors, "h_mean.net", np.concatenate([z / 4, plane]), chain) * 128
    exponent = step + np.kron(OFFSETS[levels - 1], np.ones((2, 2), np.int64))[None, :h, :w]
    y = (mean[:, :h, :w] + 4 * 2.0 ** (exponent / 8) * q) / 128
    deep = ["block"] * config["depth_16"]
    fine = ["block"] * config["depth_8"]
    chain = ["conv", *deep, "conv", 2, *fine, "conv", 8]
    x = network(tensors, "g_s.net", np.concatenate([y, exponent / 63]), chain)
    if config["shortcut"]:
        x = x + shuffle(layer(tensors, "g_s.shortcut", y), 16)
    pixels = np.clip(x[:, :height, :width] * 127.5 + 128, 0, 255)
    return pixels.astype(np.uint8).transpose(1, 2, 0)


def decode(stream, model):
    """Pixels uint8 (height, width, 3) of a stream; `model` is what `read_model` returned."""
    config, tensors, sha256 = model
    height, width, *symbols = decode_symbols(stream, config, tensors, sha256)
    if not height:
        return np.zeros((0, 0, 3), np.uint8)
    return synthesise(config, tensors, height, width, *symbols)


if __name__ == "__main__":
    picture = decode(Path(sys.argv[2]).read_bytes(), read_model(sys.argv[1]))
    rows, columns = picture.shape[:2]
    sys.stdout.buffer.write(b"P6 %d %d 255\n" % (columns, rows) + picture.tobytes())
