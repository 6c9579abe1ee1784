"""Compiles CUDA text from standard input with NVIDIA's compiler, for the architecture that is named, and prints its report.

For each entry point whose code waits for the kernel before it, a line `loads before the wait: N NAME` follows: the reads of
global memory that the assembler left ahead of the wait. For each with a loop that reads 16 bytes at a time, a line `loads between
turns: N NAME`: those reads of the loop that reads most whose registers nothing reads before the loop begins anew.

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
LOAD = 0x981  # LDG
BRANCH = 0x947  # BRA
MATRICES = 0x23C  # HMMA


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
            yield name[len(".text.") :], [int.from_bytes(cubin[i : i + INSTRUCTION], "little") for i in heads]


def operation(instruction):
    return instruction & 0xFFF


def byte(instruction, at):
    return instruction >> at & 0xFF


def sources(instruction):
    """Registers that an instruction reads; of more than one that an operand may have, those of the matrix units'."""
    first, third = byte(instruction, 24), byte(instruction, 64)
    # The second operand is a register, not a constant, in this form alone.
    second = [byte(instruction, 32)] if instruction >> 9 & 7 == 1 else []
    wide = [first + 1, first + 2, first + 3, second[0] + 1] if operation(instruction) == MATRICES else []
    return [first, third, *second, *wide]


def is_wide_load(instruction):
    return operation(instruction) == LOAD and instruction >> 73 & 7 == 6


def loops(instructions):
    """What stands between the target of each branch that leads back and the branch."""
    for i, instruction in enumerate(instructions):
        if operation(instruction) == BRANCH:
            far = instruction >> 34 & (1 << 48) - 1
            words = ((far - (far >> 47 << 48)) << 8) + byte(instruction, 16)
            yield instructions[i + 1 + words * 4 // INSTRUCTION : i]


def unread(loop):
    """Loads of 16 bytes in a loop, of which nothing is read before its end."""
    loads = [i for i, instruction in enumerate(loop) if is_wide_load(instruction)]

    def is_read(i):
        loaded = range(byte(loop[i], 16), byte(loop[i], 16) + 4)
        return any(register in loaded for later in loop[i + 1 :] for register in sources(later))

    return sum(not is_read(i) for i in loads)


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
        operations = [operation(instruction) for instruction in instructions]
        if WAIT in operations:
            ahead = operations[: operations.index(WAIT)]
            print(f"loads before the wait: {sum(i in LOADS for i in ahead)} {name}")
        reading = max(loops(instructions), key=lambda loop: sum(map(is_wide_load, loop)), default=[])
        if any(map(is_wide_load, reading)):
            print(f"loads between turns: {unread(reading)} {name}")


main()
