"""The nvrtc of the wheel `nvidia-cuda-nvrtc` through `cuda-bindings`, by the names that CuPy's binding has: a compiler
for any architecture, without a GPU, a driver or a toolkit."""

from __future__ import annotations

from typing import Any

try:
    from cuda.bindings import nvrtc

    nvrtc.nvrtcVersion()
except Exception as error:  # not installed, or without its library
    reason = f"the kernels are not compiled for GPUs: {error}"
    found = False
else:
    reason, found = "", True


def _check(result: tuple) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(str(status))
    return values[0] if len(values) == 1 else tuple(values)


def getVersion() -> tuple[int, int]:
    return _check(nvrtc.nvrtcVersion())


def getSupportedArchs() -> list[int]:
    size = _check(nvrtc.nvrtcGetNumSupportedArchs())
    return list(_check(nvrtc.nvrtcGetSupportedArchs()))[:size]


def createProgram(source: str, name: str, headers: tuple, include_names: tuple) -> Any:
    assert not headers and not include_names
    return _check(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))


def compileProgram(program: Any, options: tuple[str, ...]) -> None:
    _check(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))


def getProgramLog(program: Any) -> str:
    log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
    _check(nvrtc.nvrtcGetProgramLog(program, log))
    return bytes(log).rstrip(b"\0").decode()


def getCUBIN(program: Any) -> bytes:
    code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def getPTX(program: Any) -> bytes:
    code = bytearray(_check(nvrtc.nvrtcGetPTXSize(program)))
    _check(nvrtc.nvrtcGetPTX(program, code))
    return bytes(code)


def destroyProgram(program: Any) -> None:
    _check(nvrtc.nvrtcDestroyProgram(program))
