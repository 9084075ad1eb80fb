"""Shapes as text, and the bytes of their elements."""

import math
from typing import Any

TUPLE = 13
# XLA's numbers of element types: name, bits of an element.
_TYPES = {
    1: ("pred", 8),
    2: ("s8", 8),
    3: ("s16", 16),
    4: ("s32", 32),
    5: ("s64", 64),
    6: ("u8", 8),
    7: ("u16", 16),
    8: ("u32", 32),
    9: ("u64", 64),
    10: ("f16", 16),
    11: ("f32", 32),
    12: ("f64", 64),
    14: ("opaque", 0),
    15: ("c64", 64),
    16: ("bf16", 16),
    17: ("token", 0),
    18: ("c128", 128),
    19: ("f8e5m2", 8),
    20: ("f8e4m3fn", 8),
    21: ("s4", 4),
    22: ("u4", 4),
    23: ("f8e4m3b11fnuz", 8),
    24: ("f8e5m2fnuz", 8),
    25: ("f8e4m3fnuz", 8),
    26: ("s2", 2),
    27: ("u2", 2),
    28: ("f8e4m3", 8),
    29: ("f8e3m4", 8),
    30: ("s1", 1),
    31: ("u1", 1),
    32: ("f4e2m1fn", 4),
    33: ("f8e8m0fnu", 8),
}


def show_shape(shape: Any) -> str:
    """A shape as XLA prints it, without its layout; of a tuple's elements the first few."""
    if shape.element_type == TUPLE:
        parts = [show_shape(part) for part in shape.tuple_shapes[:4]]
        more = len(shape.tuple_shapes) - len(parts)
        return f"({', '.join(parts)}{f', and {more} more' if more else ''})"
    name, _ = _TYPES.get(shape.element_type, (f"type{shape.element_type}", 0))
    return f"{name}[{','.join(map(str, shape.dimensions))}]"


def unpadded_bytes(shape: Any) -> int:
    """What the elements of an array take; 0 where the type does not say, and for a tuple's table of addresses."""
    _, bits = _TYPES.get(shape.element_type, ("", 0))
    return -(-math.prod(shape.dimensions) * bits // 8)
