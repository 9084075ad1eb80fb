"""Name a memory budget in bytes; get the same JAX function back with the fastest recomputation plan that fits."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxckpt.api import auto_remat as auto_remat
    from jaxckpt.api import compiler_options as compiler_options
    from jaxckpt.batches import largest_batch as largest_batch
    from jaxckpt.bounded import while_loop as while_loop
    from jaxckpt.calibration import Calibration as Calibration
    from jaxckpt.compilation.measure import Measurement as Measurement
    from jaxckpt.compilation.measure import measure as measure
    from jaxckpt.errors import BudgetError as BudgetError
    from jaxckpt.errors import CompilerError as CompilerError
    from jaxckpt.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from jaxckpt.errors import JaxckptError as JaxckptError
    from jaxckpt.errors import JaxckptWarning as JaxckptWarning
    from jaxckpt.errors import NotDifferentiableError as NotDifferentiableError
    from jaxckpt.errors import OptionError as OptionError
    from jaxckpt.errors import PlanFileError as PlanFileError
    from jaxckpt.errors import PlanMismatchError as PlanMismatchError
    from jaxckpt.errors import ShardingError as ShardingError
    from jaxckpt.errors import TargetError as TargetError
    from jaxckpt.errors import UnsupportedProgramError as UnsupportedProgramError
    from jaxckpt.fitting import Fitted as Fitted
    from jaxckpt.fitting import fit as fit
    from jaxckpt.loops import scan as scan
    from jaxckpt.planner import plan as plan
    from jaxckpt.plans import Plan as Plan
    from jaxckpt.targets.chip import define_target as define_target
    from jaxckpt.targets.sharding import mesh as mesh
    from jaxckpt.tradeoff import Frontier as Frontier
    from jaxckpt.tradeoff import frontier as frontier

# Importing JAX takes a second, and `jaxckpt --help` does not need it: names are found when they are first asked for.
_HOMES = {
    "auto_remat": "api",
    "compiler_options": "api",
    "largest_batch": "batches",
    "Calibration": "calibration",
    "define_target": "targets.chip",
    "BudgetError": "errors",
    "CompilerError": "errors",
    "InfeasibleBudgetError": "errors",
    "JaxckptError": "errors",
    "JaxckptWarning": "errors",
    "NotDifferentiableError": "errors",
    "OptionError": "errors",
    "PlanFileError": "errors",
    "PlanMismatchError": "errors",
    "ShardingError": "errors",
    "TargetError": "errors",
    "UnsupportedProgramError": "errors",
    "Fitted": "fitting",
    "fit": "fitting",
    "Measurement": "compilation.measure",
    "measure": "compilation.measure",
    "mesh": "targets.sharding",
    "Plan": "plans",
    "plan": "planner",
    "Frontier": "tradeoff",
    "frontier": "tradeoff",
    "scan": "loops",
    "while_loop": "bounded",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxckpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
