"""Compile backends/step.cu, what runs between two U-Net evaluations on TensorRT, to the PTX that ships beside it.

    pip install nvidia-cuda-nvrtc-cu12==12.0.76 && python -m bksdm_export.step_kernel

PTX and not a binary: the driver compiles it for whatever GPU there is, so that the runtime needs no compiler. By an old
NVRTC, because drivers read older PTX and not newer: 12.0 writes PTX 8.0, which drivers from 525 on read.
"""

from __future__ import annotations

import ctypes
from importlib import metadata
from pathlib import Path
from typing import Any

import bksdm_runtime

FOLDER = Path(bksdm_runtime.__file__).parent / "backends"
SOURCE, COMPILED = FOLDER / "step.cu", FOLDER / "step.ptx"
NVRTC = "nvidia-cuda-nvrtc-cu12"
OLDEST = "compute_60"  # of the GPUs that TensorRT 8.6 runs on; newer ones compile the same PTX


def compile_source(architecture: str = OLDEST) -> bytes:
    """PTX for compute_NN, a binary for sm_NN. Raises ValueError with the compiler's words, OSError without NVRTC."""
    library = _library()
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), b"step.cu", 0, None, None))
    try:
        option = f"--gpu-architecture={architecture}".encode()
        code = library.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(option))
        if code:
            raise ValueError(_text(library, program, "ProgramLog").decode())
        return _text(library, program, "CUBIN" if architecture.startswith("sm_") else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _library() -> Any:
    files = [path for path in metadata.files(NVRTC) or () if path.name.startswith("libnvrtc.so")]
    if not files:
        raise OSError(f"{NVRTC} brings no libnvrtc.so")
    return ctypes.CDLL(str(files[0].locate()))


def _text(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(library: Any, code: int) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise ValueError(library.nvrtcGetErrorString(code).decode())


if __name__ == "__main__":
    COMPILED.write_bytes(compile_source().rstrip(b"\0"))
