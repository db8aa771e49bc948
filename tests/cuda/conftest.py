"""The devices that the tests of the CUDA backend run on.

A test that takes `device` runs in emulation, and on the real device too where it is asked for (`pytest -m gpu`).
Tests of kernels on small shapes are marked `kernels`: test_sanitized.py runs those again under the sanitizers, in both
orders of the threads, and wants to see every kernel there is.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import emulated
import pytest


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """A fresh device."""
    if request.param == "emulated":
        if emulated.COMPILER is None:
            pytest.skip("the kernels are not run: there is no g++")
        return emulated.EmulatedDevice()
    return request.getfixturevalue("gpu_device")


lost: list[str] = []  # the test in which a fault ended the real device, for this whole process


@pytest.fixture
def gpu_device(the_gpu, request):
    """The real device; skips where there is none, and in what comes behind a test that lost it."""
    from ggufkit_formats.errors import DeviceError

    if lost:
        pytest.skip(f"the device was lost in {lost[0]}")
    yield the_gpu
    try:
        the_gpu.synchronize()
    except DeviceError as error:
        lost.append(request.node.nodeid)
        pytest.fail(f"the device was lost in {request.node.nodeid} : {error}", pytrace=False)


@pytest.fixture(scope="session")
def the_gpu():
    pytest.importorskip("cupy", reason="not run on a GPU: there is no CuPy")
    from ggufkit_formats.errors import DeviceError
    from ggufkit_kernels.cuda.cupy_device import CupyDevice

    try:
        return CupyDevice()
    except DeviceError as error:
        pytest.skip(str(error))


@atexit.register
def _write_record() -> None:
    """The kernels that ran, a line each, in a file of this process, for the one that started it."""
    if folder := os.environ.get("GGUFKIT_RAN"):
        lines = "".join(f"{file} {name}\n" for file, name in sorted(emulated.ran))
        Path(folder, str(os.getpid())).write_text(lines, encoding="utf-8")
