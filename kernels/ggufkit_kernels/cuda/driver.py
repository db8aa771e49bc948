"""The one function of CUDA's driver that CuPy has no way to: cuLaunchKernelEx, with the attribute by which a kernel may
begin before the one in front of it in its stream has ended ("Programmatic Dependent Launch and Synchronization" in the
CUDA programming guide; structures as in cuda.h of CUDA 12 and 13)."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; `value` is a union of 64 bytes, of which this attribute takes an int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_nbytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("n_attributes", ctypes.c_uint),
    )


@functools.cache
def _library() -> Any:
    """The driver's library, as CuPy has loaded it. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def can_launch_early() -> bool:
    """Whether the driver has the function: those for CUDA 12 and newer do."""
    try:
        return hasattr(_library(), "cuLaunchKernelEx")
    except OSError:
        return False


def launch_early(function: int, grid: Sequence[int], block: int, arguments: Sequence[np.generic], stream: int) -> None:
    """Queue a kernel that may begin before those in front of it in its stream have ended.

    function: a CUfunction; arguments: numbers of the sizes that the kernel reads; stream: a CUstream. They are copied.
    Raises RuntimeError with the driver's number for what is wrong.
    """
    attribute = LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value[0] = 1
    dims = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
    config = LaunchConfig(dims, (block, 1, 1), 0, stream, ctypes.pointer(attribute), 1)
    words = [np.array(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(words))(*[word.ctypes.data for word in words])
    status = _library().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: error {status}")
