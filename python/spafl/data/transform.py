"""From a raw batch to what a model takes: normalisation, and random crops and flips while training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = (None, "crop-flip")
PIXELS = ("standard", "unit", "raw")


@dataclass(frozen=True)
class Transform:
    """What happens to a raw batch before the model.

    ``mean`` and ``std`` are per channel on the 0..1 scale (uint8 values are divided by 255 first); both empty means
    values as stored, only cast. ``augment="crop-flip"`` is the usual CIFAR training augmentation: pad ``pad`` zeros on
    every side *before* normalisation (black pixels), cut out a window of the old size at a random place per image,
    mirror it with probability one half.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: str | None = None
    pad: int = 4

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one value per channel; got {len(self.mean)} and {len(self.std)}")
        if any(not s > 0 for s in self.std):
            raise ValueError(f"std must be positive; got {self.std}")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be None or 'crop-flip'; got {self.augment!r}")
        if not isinstance(self.pad, int) or self.pad < 0:
            raise ValueError(f"pad must be a whole number of pixels, 0 or more; got {self.pad!r}")

    def __call__(
        self, batch: Tensor, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> Tensor:
        """Turn ``batch`` (n, c, h, w), uint8 or floating on the 0..1 scale, into a new tensor of ``dtype``.

        Args:
            batch: left unchanged; the result is on its device. Without normalisation and augmentation it may have any
                shape (n, ...); int64 is tokens, which stay what they are.
            dtype: a floating type; arithmetic is done in it, in the order ``(x / 255 - mean) / std``.
            generator: given while training: draws the augmentation, two offsets per image, then one flip per image.
                The same state gives the same images on any device. None (evaluation): no augmentation.

        Raises:
            ValueError: ``batch`` is not 4-dimensional or has another number of channels than ``mean``.
        """
        if batch.dtype == torch.int64:
            return batch.clone()
        if not self.mean and self.augment is None and batch.dtype != torch.uint8:
            return batch.to(dtype, copy=True)
        if batch.ndim != 4 or (self.mean and batch.shape[1] != len(self.mean)):
            channels = len(self.mean) or "c"
            raise ValueError(f"batch must have shape (n, {channels}, h, w); got {tuple(batch.shape)}")
        if self.augment is not None and generator is not None:
            batch = crop_flip(batch, self.pad, generator)
        x = batch.to(dtype, copy=True)
        if not self.mean:
            return x
        if batch.dtype == torch.uint8:
            x.div_(255)
        if len(self.mean) == 1:  # scalars: no small tensors to build and broadcast
            return x.sub_(self.mean[0]).div_(self.std[0])
        return x.sub_(_per_channel(self.mean, dtype, x.device)).div_(_per_channel(self.std, dtype, x.device))


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def crop_flip(batch: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Zero-pad ``batch`` (n, c, h, w) by ``pad``, crop each image back at its own offset, mirror each with p = 1/2."""
    n, c, h, w = batch.shape
    # Drawn where the generator lives, then moved: a seed means the same crops on every device.
    offset = torch.randint(2 * pad + 1, (n, 2), generator=generator, device=generator.device).to(batch.device)
    flip = torch.randint(2, (n, 1), generator=generator, device=generator.device).to(batch.device)
    column = torch.arange(w, device=batch.device)
    column = offset[:, 1:] + torch.where(flip == 1, w - 1 - column, column)
    row = offset[:, :1] + torch.arange(h, device=batch.device)
    # One flat gather does crop and mirror for all channels: 230 us for 64x3x32x32 on one core, where
    # indexing with four index tensors takes 1,000 us.
    padded = F.pad(batch, (pad, pad, pad, pad)).flatten(2)
    index = (row[:, :, None] * (w + 2 * pad) + column[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return padded.gather(2, index).view(n, c, h, w)
