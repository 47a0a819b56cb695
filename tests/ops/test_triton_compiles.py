"""Triton's kernels compile for every kind of card that lmoe names, without one; `make test-triton` runs it."""

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'lmoe[triton]'", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 Triton compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmoe.ops import triton_experts

SHARED_MEMORY = 99 * 1024
"""Bytes that a block may take on Ada and on Ampere of desktops, which have least."""
ROWS = {
    "rows": "*{row}", "row_stride": "i32", "row_of": "*i64", "weights": "*fp32", "matrices": "*{factor}",
    "expert_stride": "i32", "inner_stride": "i32", "outer_stride": "i32", "out": "*{out}", "out_stride": "i32",
    "target_of": "*i64", "block_expert": "*i64", "block_start": "*i64", "block_stop": "*i64", "inner": "i32",
    "outer": "i32",
}  # fmt: skip
PRODUCTS = {
    "left_rows": "*{row}", "left_stride": "i32", "weights": "*fp32", "right_rows": "*{row}", "right_stride": "i32",
    "right_row_of": "*i64", "ends": "*i64", "choices": "i32", "experts": "i32", "out": "*{out}", "width": "i32",
    "outer": "i32",
}  # fmt: skip
LARGEST = {"ROWS": 64, "INNER": 64, "OUTER": 128}
CASES = {
    "down, bfloat16": (
        "_rows_kernel",
        ROWS,
        LARGEST | {"ADDS": False, "weights": None, "target_of": None, "OUTER": 16},
    ),
    "up, bfloat16": ("_rows_kernel", ROWS, LARGEST | {"ADDS": True, "row_of": None, "INNER": 16}),
    "frozen, bfloat16": (
        "_rows_kernel",
        ROWS,
        LARGEST | {"ADDS": False, "weights": None, "row_of": None, "target_of": None},
    ),
    "frozen, float32": ("_rows_kernel", ROWS, LARGEST | {"ADDS": True, "INNER": 32}),
    "gradients, bfloat16": ("_products_kernel", PRODUCTS, {"ROWS": 32, "WIDTH": 64, "OUTER": 128}),
    "gradients, float32": ("_products_kernel", PRODUCTS, {"ROWS": 32, "WIDTH": 64, "OUTER": 128}),
}


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_becomes_code_of_the_card_within_its_shared_memory(case, capability):
    name, types, fixed = CASES[case]
    kernel, row = getattr(triton_experts, name), "fp32" if "float32" in case else "bf16"
    fixed = {**fixed, "EXACT": False}
    signature = {
        argument: "constexpr" if argument in fixed else types[argument].format(row=row, factor="fp32", out=row)
        for argument in kernel.arg_names
    }
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=fixed), target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    assert compiled.metadata.shared <= SHARED_MEMORY
