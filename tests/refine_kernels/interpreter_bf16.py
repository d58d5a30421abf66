"""bfloat16 and TF32 in Triton's interpreter: what a GPU computes, number by number, without a GPU.

Triton's interpreter keeps bfloat16 as the bit patterns of unsigned integers and computes with those. Inside
:func:`exact_bf16` it keeps them as ``ml_dtypes.bfloat16`` instead: arithmetic rounds to nearest even as PyTorch's
does, casts from other types pass float32, ``tl.dot`` multiplies in full and adds up in float32, and dots in TF32
round both operands to 10 bits of mantissa. Order of summation, races and the compiler's own faults are not seen.
Works over the interpreters of triton 3.6 to 3.9; ``test_interpreter_bf16.py`` holds it against PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from refine_kernels import dispatch

BF16 = np.dtype(ml_dtypes.bfloat16)
_numpy_dtype_before = interpreter._get_np_dtype


@contextlib.contextmanager
def exact_bf16() -> Iterator[None]:
    """Patch the interpreter, and tell the ops that bfloat16 may run in it."""
    patches = {
        "create_masked_load": _masked_load, "create_masked_store": _masked_store, "cast_impl": _cast,
        "create_fp_to_fp": lambda self, x, dtype, rounding_mode: self.cast_impl(x, dtype), "create_dot": _dot,
    }  # fmt: skip
    before = {name: getattr(InterpreterBuilder, name) for name in patches}
    try:
        interpreter._get_np_dtype = _numpy_dtype
        for name, patch in patches.items():
            setattr(InterpreterBuilder, name, patch)
        dispatch.interpreter_computes_bfloat16(True)
        yield
    finally:
        dispatch.interpreter_computes_bfloat16(False)
        interpreter._get_np_dtype = _numpy_dtype_before
        for name, original in before.items():
            setattr(InterpreterBuilder, name, original)


def _numpy_dtype(dtype) -> np.dtype:
    is_pointer = dtype.scalar.is_ptr()
    return BF16 if not is_pointer and dtype.scalar == tl.bfloat16 else _numpy_dtype_before(dtype)


def _masked_load(self, pointers, mask, other, *_) -> TensorHandle:
    element, dtype = pointers.get_element_ty(), _numpy_dtype(pointers.get_element_ty())
    other = np.zeros(pointers.data.shape, dtype) if other is None else other.data
    found = interpreter._interpreter.load(
        pointers.data, _mask(mask), _bits(other), _bits(np.empty(0, dtype)).dtype
    )
    return TensorHandle(found.view(dtype), element)


def _masked_store(self, pointers, value, mask, *_) -> None:
    return interpreter._interpreter.store(pointers.data, _bits(value.data), _mask(mask))


def _mask(mask: TensorHandle) -> np.ndarray:
    assert mask.data.dtype == bool, "a block and a scalar condition are no mask: select by tl.where"
    return mask.data


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == BF16 else x


def _cast(self, x, dtype) -> TensorHandle:
    wanted, data = _numpy_dtype(dtype), x.data
    if wanted == BF16 and data.dtype != BF16:
        data = data.astype(np.float32)
    return TensorHandle(data.astype(wanted), dtype.scalar)


def _dot(self, a, b, accumulator, input_precision, *_) -> TensorHandle:
    dtype, operands = accumulator.data.dtype, (a.data, b.data)
    if a.data.dtype == np.float32 and "tf32" in str(input_precision).lower():
        operands = [_round_to_tf32(x) for x in operands]
    a_data, b_data = (x.astype(dtype) for x in operands)
    return TensorHandle(np.matmul(a_data, b_data) + accumulator.data, accumulator.dtype.scalar)


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)
