"""Compilers by name: those of jaxckpt's platforms, and those that users register."""

from jaxckpt.errors import TargetError
from jaxckpt.targets.compiler import Compiler
from jaxckpt.targets.cpu import CpuCompiler
from jaxckpt.targets.gpu import GpuCompiler
from jaxckpt.targets.tpu import TpuCompiler

# By JAX's name of the platform.
OWN: dict[str, Compiler] = {"cpu": CpuCompiler(), "cuda": GpuCompiler(), "tpu": TpuCompiler()}
_REGISTERED: dict[str, Compiler] = {}


def own_compiler(backend: str) -> Compiler:
    """Return a platform's own compiler by what `jax.default_backend` calls it; of another one, the defaults."""
    found = (compiler for platform, compiler in OWN.items() if backend in (platform, compiler.backend))
    return next(found, Compiler())


def register_compiler(name: str, compiler: Compiler) -> None:
    """Name a compiler with rules of its own, for `define_target(..., compiler=name)`.

    Args:
        name: what targets call it; a name that is registered already is replaced.
        compiler: its rules. Under `JAXCKPT_ISOLATE` its class has to be in a module that other processes can import.

    Raises:
        TargetError: a name that jaxckpt itself uses, or something that is no compiler.

    Example:
        >>> from jaxckpt.targets.cpu import CpuCompiler
        >>> class SlowStacks(CpuCompiler):
        ...     stacking_passes = 100
        >>> register_compiler("slow-stacks", SlowStacks())
    """
    if not isinstance(name, str) or not name:
        raise TargetError(f"register_compiler: {name!r} is no name")
    if name in OWN:
        raise TargetError(f"register_compiler: {name!r} is one of jaxckpt's own; call yours something else")
    if not isinstance(compiler, Compiler):
        raise TargetError(f"register_compiler: {name!r} should be a Compiler, such as CpuCompiler(), not {compiler!r}")
    _REGISTERED[name] = compiler


def compiler_named(name: str) -> Compiler:
    """Return a compiler by name.

    Raises:
        TargetError: nothing is registered under it.
    """
    compiler = OWN.get(name) or _REGISTERED.get(name)
    if compiler is None:
        known = ", ".join([*OWN, *_REGISTERED])
        raise TargetError(f"compiler={name!r} is not known, only {known}; jaxckpt.register_compiler adds one")
    return compiler
