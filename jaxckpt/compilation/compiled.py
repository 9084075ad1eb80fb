"""What a compiled program tells of what its compiler did by itself.

Names come from JAX's own scopes: what a checkpoint makes again bears `rematted_computation` in its name, in the lowered
program and in the compiled one. XLA's own rematerialization names what it makes again `NAME.remat`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# XLA adds `.remat`, `.remat2`, ... to the name of an instruction that it makes again; JAX's own names have no dot
# before `remat`.
_MADE_BY_XLA = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+\.remat\d*(?:\.[\w.-]+)? = ", re.MULTILINE)
# Products in a compiled program: as such, or as a call of a library, or multiplied out where they are small. A compiler
# that turns an operand around while it multiplies may give the product the name of what it turned.
_PRODUCT = re.compile(r"^.* (?:dot|convolution)\(.*op_name=\"([^\"]*)\"", re.MULTILINE)
_OTHER_PRODUCT = re.compile(
    r"^.* (?:custom-call|multiply)\(.*op_name=\"([^\"]*(?:dot_general|conv_general_dilated))\"", re.MULTILINE
)
# Outer products are no more than multiplications, whatever they are called.
_LOWERED_PRODUCT = re.compile(
    r"= \"?stablehlo\.(?:dot_general|convolution)\b(?!.*contracting_dims = \[\] x \[\]).*loc\((#loc\d+)\)$",
    re.MULTILINE,
)
_LOCATION = re.compile(r"^(#loc\d+) = loc\(\"([^\"]*)\"", re.MULTILINE)
_RECOMPUTED = "rematted_computation"
# Compiler flags that change which recomputation survives, or add some of the compiler's own.
_FLAG = re.compile(r"--?(xla\w*(?:remat|cse|barrier|disable_hlo_passes)\w*(?:=\S+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What is read of a compiled program.

    Attributes:
        stats: what `memory_analysis` says.
        num_rematerialized: instructions that XLA's own rematerialization made again.
        num_recomputed: products that checkpoints make again and that are still there.
    """

    stats: Any
    num_rematerialized: int
    num_recomputed: int


def read(compiled: Any) -> Compiled:
    """Read a compiled program.

    Args:
        compiled: what `Lowered.compile` returns.
    """
    text = compiled.as_text() or ""
    return Compiled(
        stats=compiled.memory_analysis(),
        num_rematerialized=num_rematerialized(text),
        num_recomputed=num_recomputed(text),
    )


def num_rematerialized(text: str) -> int:
    r"""Count what XLA's own rematerialization made again.

    Args:
        text: of a compiled program.

    Example:
        >>> num_rematerialized("  %fusion.3.remat2 = f32[8] fusion(%p)\n  %remat2.24 = f32[8] add(%a, %b)")
        1
    """
    return len(_MADE_BY_XLA.findall(text))


def num_recomputed(text: str) -> int:
    """Count the products and convolutions of a compiled program that checkpoints make again.

    Args:
        text: of a compiled program.
    """
    return sum(_RECOMPUTED in name for products in (_PRODUCT, _OTHER_PRODUCT) for name in products.findall(text))


def num_asked(text: str) -> int:
    """Count the products and convolutions that a lowered program's checkpoints make again.

    Args:
        text: of a lowered program, with its locations.
    """
    names = {place for place, name in _LOCATION.findall(text) if _RECOMPUTED in name}
    return sum(place in names for place in _LOWERED_PRODUCT.findall(text))


def flags(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The compiler flags in an environment that change which recomputation survives.

    Args:
        environment: variables by name, such as `os.environ`.

    Example:
        >>> flags({"XLA_FLAGS": "--xla_dump_to=x --xla_disable_hlo_passes=cse"})
        ('xla_disable_hlo_passes=cse in XLA_FLAGS',)
    """
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return tuple(f"{flag} in {name}" for name in names for flag in _FLAG.findall(environment.get(name, "")))
