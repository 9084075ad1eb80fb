"""Name a memory budget in bytes; get the same JAX function back with the fastest recomputation plan that fits."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxckpt._version import __version__ as __version__

if TYPE_CHECKING:
    from jaxckpt.api.auto_remat import auto_remat as auto_remat
    from jaxckpt.api.auto_remat import compiler_options as compiler_options
    from jaxckpt.api.doctor import doctor as doctor
    from jaxckpt.api.fit import fit as fit
    from jaxckpt.api.frontier import frontier as frontier
    from jaxckpt.api.jit import jit as jit
    from jaxckpt.api.largest_batch import largest_batch as largest_batch
    from jaxckpt.api.measure import measure as measure
    from jaxckpt.api.names import names as names
    from jaxckpt.api.plan import plan as plan
    from jaxckpt.api.read_memory import read_memory as read_memory
    from jaxckpt.api.scan import scan as scan
    from jaxckpt.api.while_loop import while_loop as while_loop
    from jaxckpt.compilation.buffers import Buffer as Buffer
    from jaxckpt.compilation.buffers import CompiledMemory as CompiledMemory
    from jaxckpt.compilation.measure import Measurement as Measurement
    from jaxckpt.errors import BudgetError as BudgetError
    from jaxckpt.errors import CompilerError as CompilerError
    from jaxckpt.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from jaxckpt.errors import JaxckptError as JaxckptError
    from jaxckpt.errors import JaxckptWarning as JaxckptWarning
    from jaxckpt.errors import NotDifferentiableError as NotDifferentiableError
    from jaxckpt.errors import OptionError as OptionError
    from jaxckpt.errors import PlanFileError as PlanFileError
    from jaxckpt.errors import PlanMismatchError as PlanMismatchError
    from jaxckpt.errors import ProgramFormatError as ProgramFormatError
    from jaxckpt.errors import ShardingError as ShardingError
    from jaxckpt.errors import TargetError as TargetError
    from jaxckpt.errors import UnsupportedProgramError as UnsupportedProgramError
    from jaxckpt.kinds.base import Kind as Kind
    from jaxckpt.kinds.base import register_kind as register_kind
    from jaxckpt.result.diagnosis import Diagnosis as Diagnosis
    from jaxckpt.result.findings import Finding as Finding
    from jaxckpt.result.fitted import Fitted as Fitted
    from jaxckpt.result.frontier import Frontier as Frontier
    from jaxckpt.result.names import Names as Names
    from jaxckpt.result.plan import Plan as Plan
    from jaxckpt.search.calibration import Calibration as Calibration
    from jaxckpt.targets.chip import define_target as define_target
    from jaxckpt.targets.compiler import Compiler as Compiler
    from jaxckpt.targets.registry import register_compiler as register_compiler
    from jaxckpt.targets.sharding import mesh as mesh

# Importing JAX takes a second, and `jaxckpt --help` does not need it: names are found when they are first asked for.
_HOMES = {
    "auto_remat": "api.auto_remat",
    "compiler_options": "api.auto_remat",
    "largest_batch": "api.largest_batch",
    "Calibration": "search.calibration",
    "define_target": "targets.chip",
    "register_kind": "kinds.base",
    "Kind": "kinds.base",
    "Compiler": "targets.compiler",
    "register_compiler": "targets.registry",
    "BudgetError": "errors",
    "CompilerError": "errors",
    "InfeasibleBudgetError": "errors",
    "JaxckptError": "errors",
    "JaxckptWarning": "errors",
    "NotDifferentiableError": "errors",
    "OptionError": "errors",
    "PlanFileError": "errors",
    "PlanMismatchError": "errors",
    "ProgramFormatError": "errors",
    "ShardingError": "errors",
    "TargetError": "errors",
    "UnsupportedProgramError": "errors",
    "Fitted": "result.fitted",
    "Diagnosis": "result.diagnosis",
    "Finding": "result.findings",
    "doctor": "api.doctor",
    "fit": "api.fit",
    "jit": "api.jit",
    "Measurement": "compilation.measure",
    "measure": "api.measure",
    "Buffer": "compilation.buffers",
    "CompiledMemory": "compilation.buffers",
    "read_memory": "api.read_memory",
    "mesh": "targets.sharding",
    "Names": "result.names",
    "names": "api.names",
    "Plan": "result.plan",
    "plan": "api.plan",
    "Frontier": "result.frontier",
    "frontier": "api.frontier",
    "scan": "api.scan",
    "while_loop": "api.while_loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxckpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
