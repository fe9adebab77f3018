"""The table of element types agrees with torch and numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire.dtypes import DTYPE_PATTERN, DTYPES


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_torch_and_numpy_have_the_type_with_its_size(name: str) -> None:
    dtype, array = DTYPES[name], np.dtype(DTYPES[name].little_endian)
    assert TORCH_DTYPES[name].itemsize == array.itemsize == dtype.itemsize
    assert str(TORCH_DTYPES[name]) == f"torch.{dtype.long_name}"
    assert np.dtype(dtype.long_name) == array.newbyteorder("=")
    assert torch.zeros(3, dtype=TORCH_DTYPES[name]).numpy().astype(array, copy=False).tobytes() == bytes(
        3 * dtype.itemsize
    )


def test_the_pattern_of_a_manifest_has_every_name_and_no_other() -> None:
    assert TORCH_DTYPES.keys() == DTYPES.keys()
    assert all(re.match(DTYPE_PATTERN, name) for name in DTYPES)
    assert not any(re.match(DTYPE_PATTERN, name) for name in ("", "fp16", "fp32 ", "xfp32", "FP32"))
