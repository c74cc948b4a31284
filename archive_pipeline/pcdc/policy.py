"""The learned allocation policy: how much each level of each block is worth (section II-B).

State of a block, equation (3), from what the encoder has without decoding::

    Phi_h   statistics of the high-pass residual, brightness and colour      (8)
    Phi_z   encoder features y, the block's four of each channel             (4 M)
    costs   bits R_b(a) and quantisation error of the latents at each level  (2 K)
    p_b     place in the tile, and the image step                            (3)

    state (C, B_h, B_w) --normalise--> --3x3 three times--> log importance (B_h, B_w)
                                                       \\-> value V, given the price (critic)

One number a block is learned: how much more than usual its bits are worth. `importance.level_worth`
makes of it the worth f of each level. A policy that knows nothing thus codes all blocks alike.
What a block shows is in the signs of its features and in its neighbours: the state keeps all of
the features, not their means, and the network sees three blocks to each side.

The actor is pi(a | s) = softmax(k (f_a - eta R_b(a) / R)), with eta the price of bits (the dual
variable of equation (6)) and R the usual bits of a block at that image step. So the remaining
budget rho_b acts through the price: the encoder looks for the one at which the whole image fits.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.pcdc.allocation import LEVELS, BlockCosts
from archive_pipeline.pcdc.constants import BLOCK, BLOCK_SIDE, MAX_EXPONENT
from archive_pipeline.pcdc.importance import level_worth
from archive_pipeline.pcdc.model_files import check_header

POLICY = "allocation.safetensors"
FORMAT = "pcdc-allocation-3"
MAX_FILE_BYTES = 16 << 20
MAX_WIDTH = 512
RESIDUAL = 8
PLACE = 3
MOST_IMPORTANT = 3.0  # largest |log importance|: a factor of 20
# of the first draws: much less, and the noise of all other blocks' levels hides what one does
SHARPNESS = 3.0
FINE, COARSE = 5, 17  # sides in pixels of the boxes whose differences are the residual's two bands


class PolicyError(ArchivePipelineError, ValueError):
    """A policy file is damaged or of a kind this version does not know."""


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of a policy, and the units that it was trained in.

    Attributes:
        latents: channels M of the codec's y.
        features: channels that y is reduced to.
        width: channels of the hidden layers.
        rate: (a, b): a block usually takes exp(a + b g) bits at image step g.
        slope: (a, b): a bit then usually buys exp(a + b g) of utility.
    """

    latents: int = 192
    features: int = 64
    width: int = 64
    rate: tuple[float, float] = (0.0, 0.0)
    slope: tuple[float, float] = (0.0, 0.0)

    def usual_bits(self, image_step: int) -> float:
        """Usual bits of a block at an image step."""
        return math.exp(self.rate[0] + self.rate[1] * image_step)

    def usual_slope(self, image_step: int) -> float:
        """Usual utility a bit at an image step."""
        return math.exp(self.slope[0] + self.slope[1] * image_step)


def residual_statistics(tile: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Phi_h: statistics (8, B_h, B_w) of a tile (height, width, 3) over its 32 px blocks.

    Log mean, root mean square and maximum of the finest band's magnitude, log mean of the next
    band's, then mean and deviation of brightness and the mean of both colour differences.
    """
    import cv2  # only where a policy decides

    height, width = tile.shape[:2]
    tile = cv2.copyMakeBorder(
        tile, 0, -height % BLOCK_SIDE, 0, -width % BLOCK_SIDE, cv2.BORDER_REPLICATE
    )
    ycc = cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb).astype(np.float32)
    luma = np.ascontiguousarray(ycc[..., 0])
    fine = cv2.blur(luma, (FINE, FINE))
    high = np.abs(luma - fine)
    middle = np.abs(fine - cv2.blur(luma, (COARSE, COARSE)))

    rows, columns = luma.shape[0] // BLOCK_SIDE, luma.shape[1] // BLOCK_SIDE

    def mean(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        small = cv2.resize(plane, (columns, rows), interpolation=cv2.INTER_AREA)
        return small.reshape(rows, columns)

    brightness = mean(luma)
    return np.stack(
        [
            np.log1p(mean(high)),
            np.log1p(np.sqrt(mean(high * high))),
            np.log1p(high.reshape(rows, BLOCK_SIDE, columns, BLOCK_SIDE).max(1).max(-1)),
            np.log1p(mean(middle)),
            brightness / 128 - 1,
            np.log1p(np.sqrt(np.maximum(mean(luma * luma) - brightness**2, 0))),
            mean(np.ascontiguousarray(ycc[..., 1])) / 128 - 1,
            mean(np.ascontiguousarray(ycc[..., 2])) / 128 - 1,
        ]
    ).astype(np.float32)


def block_state(
    tile: NDArray[np.uint8], latents: Tensor, costs: BlockCosts, image_step: int
) -> Tensor:
    """State (C, B_h, B_w) float32 of a tile's blocks, on the CPU.

    Args:
        tile: uint8 (height, width, 3).
        latents: y of the tile, (1, M, h, w).
        costs: of the same tile at `image_step`.
    """
    rows, columns = costs.bits.shape[1:]
    y = latents.float()
    y = y.sign() * torch.log1p(y.abs() / 8)
    edge = (0, BLOCK * columns - y.shape[3], 0, BLOCK * rows - y.shape[2])
    features = F.pixel_unshuffle(F.pad(y, edge, mode="replicate"), BLOCK)[0]
    place = np.stack(
        [
            np.broadcast_to((np.arange(rows) / max(1, rows - 1))[:, None], (rows, columns)),
            np.broadcast_to(np.arange(columns) / max(1, columns - 1), (rows, columns)),
            np.full((rows, columns), image_step / MAX_EXPONENT),
        ]
    )
    signals = np.concatenate([np.log1p(costs.bits), np.log(costs.error + 1e-2), place])
    return torch.cat(
        [
            torch.from_numpy(residual_statistics(tile)),
            features.cpu(),
            torch.from_numpy(signals.astype(np.float32)),
        ]
    )


def state_groups(latents: int) -> dict[str, slice]:
    """Channels of the state by what they say, for a codec of so many latents."""
    costs = RESIDUAL + BLOCK**2 * latents
    return {
        "residual": slice(0, RESIDUAL),
        "features": slice(RESIDUAL, costs),
        "costs": slice(costs, costs + 2 * LEVELS),
        "place": slice(costs + 2 * LEVELS, costs + 2 * LEVELS + PLACE),
    }


class _Body(nn.Module):
    """State (N, C, B_h, B_w), already normalised, to hidden features (N, width, B_h, B_w)."""

    def __init__(self, config: PolicyConfig, extra: int = 0) -> None:
        super().__init__()
        others = RESIDUAL + 2 * LEVELS + PLACE + extra
        self.split = [RESIDUAL, RESIDUAL + BLOCK**2 * config.latents]
        self.reduce = nn.Conv2d(BLOCK**2 * config.latents, config.features, 1)
        self.first = nn.Conv2d(config.features + others, config.width, 3, padding=1)
        self.second = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.third = nn.Conv2d(config.width, config.width, 3, padding=1)

    def forward(self, state: Tensor) -> Tensor:
        before, latents, after = state.tensor_split(self.split, 1)
        x = torch.cat([before, F.silu(self.reduce(latents)), after], 1)
        x = F.silu(self.second(F.silu(self.first(x))))
        return x + F.silu(self.third(x))


class Policy(nn.Module):
    """Actor and critic.

    Attributes:
        mean, scale: of the state's channels; a scale of zero leaves a channel out.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__()
        self.config = config or PolicyConfig()
        channels = RESIDUAL + BLOCK**2 * self.config.latents + 2 * LEVELS + PLACE
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.actor = _Body(self.config)
        self.importance_of = nn.Conv2d(self.config.width, 1, 1)
        for parameter in self.importance_of.parameters():
            nn.init.zeros_(parameter)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))  # log k
        self.critic = _Body(self.config, extra=1)
        self.value_of = nn.Conv2d(self.config.width, 1, 1)

    def _normalise(self, state: Tensor) -> Tensor:
        return (state - self.mean[:, None, None]) * self.scale[:, None, None]

    def importance(self, state: Tensor) -> Tensor:
        """Logarithm of what bits of a block are worth, 0 as usual; (N, B_h, B_w) in -3..3."""
        raw = self.importance_of(self.actor(self._normalise(state)))[:, 0]
        return MOST_IMPORTANT * torch.tanh(raw / MOST_IMPORTANT)

    def worth(self, state: Tensor, bits: Tensor) -> Tensor:
        """Worth f (N, K, B_h, B_w) of each level beyond the base level's, in the unit of `bits`."""
        return level_worth(bits, self.importance(state))

    def logits(self, state: Tensor, bits: Tensor, price: Tensor) -> Tensor:
        """Logits of pi (N, K, B_h, B_w).

        Args:
            state: (N, C, B_h, B_w).
            bits: costs (N, K, B_h, B_w) in usual bits of their image steps.
            price: eta (N,).
        """
        return self.sharpness.exp() * (self.worth(state, bits) - price.view(-1, 1, 1, 1) * bits)

    def value(self, state: Tensor, price: Tensor) -> Tensor:
        """V(s) (N, B_h, B_w) at a price (N,)."""
        state = self._normalise(state)
        plane = price.log().view(-1, 1, 1, 1).expand(-1, 1, *state.shape[-2:])
        return self.value_of(self.critic(torch.cat([state, plane], 1)))[:, 0]

    @torch.no_grad()
    def block_worth(
        self, tile: NDArray[np.uint8], latents: Tensor, costs: BlockCosts, image_step: int
    ) -> NDArray[np.float64]:
        """Worth (K, B_h, B_w) of a tile's levels in utility, as `Codec.encode` asks for it."""
        state = block_state(tile, latents, costs, image_step)
        importance = self.importance(state[None].to(self.mean.device))[0].double().cpu()
        bits = level_worth(torch.from_numpy(costs.bits), importance)
        return (bits * self.config.usual_slope(image_step)).numpy()


def pack_policy(policy: Policy) -> bytes:
    """Return the file of a policy: safetensors, its configuration in the metadata."""
    tensors = {k: v.detach().cpu().float().contiguous() for k, v in policy.state_dict().items()}
    config = {"format": FORMAT, **asdict(policy.config)}
    return save_tensors(tensors, metadata={"config": json.dumps(config)})


def policy_digest(data: bytes) -> str:
    """SHA-256 of a policy's file, its identity."""
    return hashlib.sha256(data).hexdigest()


def load_policy(data: bytes, latents: int) -> Policy:
    """Build a policy from its file's contents, for a codec of so many latents.

    Raises:
        PolicyError: it is damaged, too large, of an unknown kind or for another codec.
    """
    if len(data) > MAX_FILE_BYTES:
        raise PolicyError("larger than a policy may be")
    try:
        check_header(data)
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        config = json.loads(header["__metadata__"]["config"])
        if config.pop("format") != FORMAT:
            raise PolicyError("of an unknown format")
        sizes = {k: config[k] for k in ("latents", "features", "width")}
        if any(type(v) is not int or not 1 <= v <= MAX_WIDTH for v in sizes.values()):
            raise PolicyError(f"sizes out of range: {sizes}")
        if sizes["latents"] != latents:
            raise PolicyError(f"latents={sizes['latents']}, but the codec has {latents}")
        units = {k: (float(config[k][0]), float(config[k][1])) for k in ("rate", "slope")}
        numbers = [v for pair in units.values() for v in pair]
        if not all(abs(v) < 64 for v in numbers):  # nor is NaN
            raise PolicyError(f"units out of range: {units}")
        if any(t.dtype != torch.float32 or not t.isfinite().all() for t in tensors.values()):
            raise PolicyError("weights are not finite float32")
        chosen = PolicyConfig(**sizes, rate=units["rate"], slope=units["slope"])
        with torch.device("meta"):
            policy = Policy(chosen)
        policy.load_state_dict(tensors, assign=True)
    except PolicyError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
        SafetensorError,
    ) as error:
        raise PolicyError(f"cannot be read: {error}") from error
    return policy.eval().requires_grad_(False)
