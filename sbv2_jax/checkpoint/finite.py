"""Arrays without NaN and infinities, told from their bytes."""

import numpy as np

_CHUNK = 1 << 20  # elements: the copy that a comparison needs stays in the cache
# By the bytes of a type: its sign's and exponent's bits. An exponent of ones alone is NaN or an infinity.
_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
}


def is_finite(array: np.ndarray) -> bool:
    """Whether an array, float32, float16 or bfloat16, holds neither NaN nor an infinity.

    In one pass over its bytes and with little memory, so that it may be asked of a mapped file. Other types are
    compared as NumPy does.
    """
    key = "bfloat16" if array.dtype.name == "bfloat16" else array.dtype
    if key not in _EXPONENTS:
        return bool(np.isfinite(array).all())
    kind, magnitude, infinity = _EXPONENTS[key]
    # Any order of the elements will do; that of memory makes no copy of a view with its axes moved.
    bits = array.transpose(np.argsort(array.strides)[::-1]).reshape(-1).view(kind)
    return all(
        (bits[at : at + _CHUNK] & kind(magnitude)).max() < infinity for at in range(0, len(bits), _CHUNK)
    )
