"""Optimal checkpoint placement in pure Python: one problem model, one judge, one file per method.

Block problems (`Problem`) have their solvers here; graphs, time-stepping loops and the rest stand in modules of their
own: `dag`, `training`, `checkmate`, `lower_sets_dag`, `knapsack`, `online`, `multistage`, `brute`, `brute_dag`.
"""

from ckptsolvers.chain import ChainTable as ChainTable
from ckptsolvers.chain import solve_chain as solve_chain
from ckptsolvers.chen import chen_schedules as chen_schedules
from ckptsolvers.chen import solve_chen as solve_chen
from ckptsolvers.citations import cite as cite
from ckptsolvers.errors import InfeasibleError as InfeasibleError
from ckptsolvers.errors import InvalidProblemError as InvalidProblemError
from ckptsolvers.errors import InvalidScheduleError as InvalidScheduleError
from ckptsolvers.errors import SolverError as SolverError
from ckptsolvers.lower_sets import solve_lower_sets as solve_lower_sets
from ckptsolvers.problem import Block as Block
from ckptsolvers.problem import Option as Option
from ckptsolvers.problem import Problem as Problem
from ckptsolvers.problem import Value as Value
from ckptsolvers.problem import chain as chain
from ckptsolvers.regions_milp import solve_regions_milp as solve_regions_milp
from ckptsolvers.revolve import revolve_schedules as revolve_schedules
from ckptsolvers.revolve import solve_revolve as solve_revolve
from ckptsolvers.schedule import Keep as Keep
from ckptsolvers.schedule import Recompute as Recompute
from ckptsolvers.schedule import Schedule as Schedule
from ckptsolvers.schedule import Step as Step
from ckptsolvers.schedule import region as region
from ckptsolvers.simulate import Judgement as Judgement
from ckptsolvers.simulate import simulate as simulate
from ckptsolvers.solution import Solution as Solution
from ckptsolvers.solve import solve as solve
