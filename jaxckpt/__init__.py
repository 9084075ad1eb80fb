"""Name a memory budget in bytes; get the same JAX function back with the fastest recomputation plan that fits."""

__version__ = "0.1.0"

from jaxckpt.api import auto_remat as auto_remat
from jaxckpt.api import compiler_options as compiler_options
from jaxckpt.errors import BudgetError as BudgetError
from jaxckpt.errors import InfeasibleBudgetError as InfeasibleBudgetError
from jaxckpt.errors import JaxckptError as JaxckptError
from jaxckpt.errors import JaxckptWarning as JaxckptWarning
from jaxckpt.errors import NotDifferentiableError as NotDifferentiableError
from jaxckpt.errors import PlanFileError as PlanFileError
from jaxckpt.errors import PlanMismatchError as PlanMismatchError
from jaxckpt.errors import TargetError as TargetError
from jaxckpt.errors import UnsupportedProgramError as UnsupportedProgramError
from jaxckpt.measure import Measurement as Measurement
from jaxckpt.measure import measure as measure
from jaxckpt.plan import Plan as Plan
from jaxckpt.planner import plan as plan
