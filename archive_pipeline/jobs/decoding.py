"""How the pixels of archived images are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from archive_pipeline.codec.settings import Settings
from archive_pipeline.pcdc.precision import Precision


@dataclass(frozen=True)
class Decoding:
    """How pixels are decoded.

    Attributes:
        device: "auto", "cpu" or "cuda".
        steps: denoising steps; 0 is the deterministic decoder.
        seed: of the denoiser's noise.
        precision: of the codec's large networks.
        realism: how much of the detail that denoising generates is in the pixels, 0..1.
    """

    device: str
    steps: int
    seed: int
    precision: Precision
    realism: float = 1.0

    def settings(self) -> Settings:
        """The same for the codec, with the device that is there.

        Raises:
            ValueError: CUDA is asked for and there is none.
        """
        from archive_pipeline.codec.models import find_device  # torch: only for pixels

        return Settings(
            find_device(self.device),
            self.steps,
            self.seed,
            precision=self.precision,
            realism=self.realism,
        )
