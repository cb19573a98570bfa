"""The kernels compile for a device, where a CUDA compiler is at hand."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from hybridopt.kernels.compilation import UNROLL, kernel_options, kernel_source
from hybridopt.kernels.layout import pack_size

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NVCC = shutil.which("nvcc")
VARIANTS = [((F32, F32, BF16), 2), ((BF16, BF16, BF16), 1), ((F16, F32, F32), 0)]


def compile_with_nvrtc(source, options):
    """PTX from NVRTC, which needs neither a device nor a driver."""
    nvrtc = pytest.importorskip("cupy.cuda.nvrtc")
    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"NVRTC does not load: {error}")
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, ("--gpu-architecture=sm_90", *options))
    except Exception:
        pytest.fail(nvrtc.getProgramLog(program))
    return nvrtc.getPTX(program)


@pytest.mark.parametrize("file", sorted(UNROLL))
def test_kernels_compile_under_nvrtc(file):
    for roles, directions in VARIANTS:
        options = kernel_options(file, roles, directions, adamw=directions == 2)
        assert compile_with_nvrtc(kernel_source(file), options)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("file", sorted(UNROLL))
def test_kernels_access_memory_in_16_bytes_under_nvcc(file, tmp_path):
    (tmp_path / "kernel.cu").write_text(kernel_source(file), encoding="utf-8")
    options = kernel_options(file, (F32, F32, F32), 1, adamw=True)
    command = [NVCC, "-ptx", "-arch=sm_90", *options, "kernel.cu", "-o", "kernel.ptx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "kernel.ptx").read_text()
    assert ".entry" in text
    if file != "plan":
        assert re.search(r"ld\.global(\.cs)?\.v4\.", text)


def test_options_name_formats_and_packs():
    options = kernel_options("apply", (F32, BF16, F16), 2)
    for option in ("PARAM=f32", "GRAD=bf16", "BASIS=f16", "PACK=4", "DIRECTIONS=2"):
        assert f"-D{option}" in options
    assert pack_size([BF16, F16]) == 8
