"""Compiles CUDA text from standard input with NVIDIA's compiler, for the architecture that is named, and prints its report.

In Python, because the compiler comes as a package of it (nvidia-cuda-nvrtc-cu12), and calling a C library from a test in Rust
would take unsafe code outside the backends. Exits with 2 where there is no compiler.
"""

import ctypes
import glob
import os
import sys


def candidates():
    """Paths under which the library may be found: in the package, then where the loader looks."""
    try:
        import nvidia.cuda_nvrtc as package

        yield from sorted(glob.glob(os.path.join(list(package.__path__)[0], "lib", "libnvrtc.so*")))
    except ImportError:
        pass
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def load():
    for path in candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    sys.exit(2)


def main():
    compiler = load()
    options = [f"--gpu-architecture={sys.argv[1]}", "--std=c++17", "-default-device", "--ptxas-options=-v"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), sys.stdin.buffer.read(), b"kernels.cu", 0, None, None)
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = compiler.nvrtcCompileProgram(program, len(options), texts)
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    report = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, report)
    print(report.value.decode())
    sys.exit(1 if code else 0)


main()
