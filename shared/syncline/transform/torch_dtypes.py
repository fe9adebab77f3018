"""The element types of `syncline.wire.dtypes` as torch has them."""

from __future__ import annotations

import torch

from syncline.wire.dtypes import DTYPES

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.long_name) for name, dtype in DTYPES.items()}
