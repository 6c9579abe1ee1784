"""Compiles CUDA text from standard input with NVIDIA's compiler, for the architecture that is named, and prints its report.

For each entry point whose code waits for the kernel before it, a line `loads before the wait: N NAME` follows: the reads of
global memory that the assembler left ahead of the wait.

In Python, because the compiler comes as a package of it (nvidia-cuda-nvrtc-cu12), and calling a C library from a test in Rust
would take unsafe code outside the backends. Exits with 2 where there is no compiler.
"""

import ctypes
import glob
import os
import struct
import sys

# Of compute capability 7.0 and later: instructions have 16 bytes, and the first twelve bits say which it is.
INSTRUCTION = 16
LOADS = (0x981, 0xFAE)  # LDG, LDGSTS
WAIT = 0x82E  # ACQBULK, griddepcontrol.wait


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


def compiled(compiler, program):
    """The CUBIN of a program."""
    size = ctypes.c_size_t()
    compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def code(cubin):
    """Names and instructions of a CUBIN's entry points."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    width, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    # Name, and where the section is, of each.
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * width) for i in range(count)]
    names = sections[of_names][1]
    for name, at, size in sections:
        name = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if name.startswith(".text."):
            heads = range(at, at + size, INSTRUCTION)
            yield name[len(".text.") :], [struct.unpack_from("<H", cubin, i)[0] & 0xFFF for i in heads]


def main():
    compiler = load()
    options = [f"--gpu-architecture={sys.argv[1]}", "--std=c++17", "-default-device", "--ptxas-options=-v"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), sys.stdin.buffer.read(), b"kernels.cu", 0, None, None)
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = compiler.nvrtcCompileProgram(program, len(options), texts)
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    report = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, report)
    print(report.value.decode())
    if failed:
        sys.exit(1)
    for name, instructions in code(compiled(compiler, program)):
        if WAIT in instructions:
            ahead = instructions[: instructions.index(WAIT)]
            print(f"loads before the wait: {sum(i in LOADS for i in ahead)} {name}")


main()
