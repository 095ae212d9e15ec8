"""Compile the Triton tiles for devices that need not be here, and print what each kernel takes of them.

    TRITON_INTERPRET=0 python tests/compile_tiles.py

One line each: kernel, variant, device, registers, spilled bytes, shared memory. test_triton.py runs it in a process of
its own, since a kernel is either interpreted or compiled in one process.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trl_qtarget.loss.triton_tiles import BLOCK_V, NUM_WARPS, gradient_kernel, statistics_kernel


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# HAS_POOL, HAS_STUDENT, HAS_TEACHER, HAS_SOFTCAP
VARIANTS = {
    "student": (False, True, False, False),
    "teacher": (True, True, True, False),
    "uniform": (True, False, False, False),
    "softcap": (True, True, True, True),
}
INTEGERS = {"stride_g", "stride_z", "stride_t", "n", "V"}
FLOATS = {"student", "teacher", "softcap"}
FLAGS = ("HAS_POOL", "HAS_STUDENT", "HAS_TEACHER", "HAS_SOFTCAP")


def compiled(kernel, flags, target):
    constants = {**dict(zip(FLAGS, flags, strict=True)), "BLOCK_V": BLOCK_V}
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS | FLOATS:
            types[name] = "i32" if name in INTEGERS else "fp32"
        else:
            types[name] = {"y_ptr": "*i64", "g_ptr": "*bf16"}.get(name, "*fp32")
    # as for real tensors: pointers and strides are multiples of 16, which widens loads and takes fewer registers
    aligned = [
        i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name.startswith("stride")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": NUM_WARPS})


def resources(binary) -> tuple[int, int]:
    """Registers and spilled bytes of one compiled kernel."""
    if "cubin" not in binary.asm:
        text = binary.asm["amdgcn"]
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]), int(
            re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]
        )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    # what ptxas spills is on the stack; LOCAL counts arrays that were declared
    registers, *spilled = (int(re.search(rf"{name}:(\d+)", report.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, sum(spilled)


def main() -> None:
    for kernel in (statistics_kernel, gradient_kernel):
        for variant, flags in VARIANTS.items():
            for device, target in TARGETS.items():
                binary = compiled(kernel, flags, target)
                registers, spilled = resources(binary)
                name = kernel.__name__
                print(
                    f"{name:18} {variant:8} {device:7} {registers:4} {spilled:4} {binary.metadata.shared:6}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
