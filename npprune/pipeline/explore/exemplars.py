"""The images that excite neurons most, kept while images go by, and where in them they fire."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEVELS = 15  # above 0 of a lit patch: one hexadecimal digit each
DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


class Exemplars:
    """Of each of n neurons the images of the largest values; ties go to the earlier image."""

    def __init__(self, neurons: int, count: int, patches: int) -> None:
        self.count = count
        self.values = torch.empty(neurons, 0)
        self.rows = torch.empty(neurons, 0, dtype=torch.int64)
        self.maps = torch.empty(neurons, 0, patches, dtype=torch.float16)

    def add(self, rows: list[int], values: Tensor, maps: Tensor) -> None:
        """Images `rows`: values [b, n], and activations at the patches [b, p, n]."""
        n = len(self.values)
        values = torch.cat([self.values, values.T], 1)
        seen = torch.cat([self.rows, torch.tensor(rows).expand(n, -1)], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.count]
        self.values, self.rows = values.gather(1, order), seen.gather(1, order)
        both = torch.cat([self.maps, maps.permute(2, 0, 1).to(torch.float16)], 1)
        self.maps = both.gather(1, order[..., None].expand(-1, -1, both.shape[2]))

    def lit(self, neuron: int) -> list[str]:
        """The maps of a neuron's images, beside each other comparable (see `lit`)."""
        return lit(self.maps[neuron].float())


def lit(maps: Tensor) -> list[str]:
    """Activations [k, p] as text: a hexadecimal digit a patch, 0 where the neuron does not fire,
    f where it does most in any of them."""
    if not maps.numel():
        return [""] * len(maps)
    return each_lit(maps[None])[0]


def each_lit(maps: Tensor) -> list[list[str]]:
    """As `lit` for each of n [n, k, p], every one on a scale of its own."""
    highest = maps.amax((1, 2), keepdim=True)
    scale = torch.where(highest > 0, highest, 1)
    levels = (maps.clamp_min(0) / scale * LEVELS).ceil().clamp_max(LEVELS).to(torch.uint8)
    text = DIGITS[levels.numpy()]
    return [[row.tobytes().decode() for row in one] for one in text]
