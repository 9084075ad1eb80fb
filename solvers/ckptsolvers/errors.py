"""The errors of the solvers. Numbers are attributes, so that callers need not parse sentences."""


class SolverError(Exception):
    """Base of every error that ckptsolvers raises on purpose."""


class InvalidProblemError(SolverError, ValueError):
    """A problem that cannot be solved as stated: a negative size, a reader before its maker, a cycle."""


class InvalidScheduleError(SolverError, ValueError):
    """A schedule that reads what is not there, or does not fit the problem it is replayed on."""


class InfeasibleError(SolverError):
    """No schedule of the solver's class fits the budget.

    Attributes:
        budget_bytes: what was asked for.
        least_bytes: the least peak the solver reached, or None where it does not know one.
    """

    def __init__(self, budget_bytes: int, least_bytes: int | None, solver: str):
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.solver = solver
        least = "" if least_bytes is None else f"; the least peak it reached is {least_bytes:,} bytes"
        super().__init__(f"{solver} found no schedule within budget_bytes={budget_bytes:,}{least}")
