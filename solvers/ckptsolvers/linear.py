"""A sparse mixed integer program, put together row by row and handed to HiGHS through SciPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Answer:
    """What HiGHS found.

    Attributes:
        values: of every variable, or None where no solution was found.
        bound: a lower bound on the cost; minus infinity where there is none.
        is_infeasible: HiGHS proved that there is no solution.
    """

    values: np.ndarray | None
    bound: float
    is_infeasible: bool


class LinearProgram:
    """Minimise cost x subject to rows of at most and equal."""

    def __init__(self) -> None:
        """Start with no variables and no rows."""
        self._costs: list[float] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integral: list[int] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._entries: list[float] = []
        self._row_lower: list[float] = []
        self._row_upper: list[float] = []

    def add_binary(self, *, cost: float = 0.0, fixed: float | None = None) -> int:
        """Add a variable that is 0 or 1, or fixed to one of the two."""
        self._integral.append(1)
        return self._add(cost, 0.0 if fixed is None else fixed, 1.0 if fixed is None else fixed)

    def add_continuous(self, *, upper: float, cost: float = 0.0) -> int:
        """Add a variable between 0 and `upper`."""
        self._integral.append(0)
        return self._add(cost, 0.0, upper)

    def is_fixed_to_one(self, variable: int) -> bool:
        """Whether a variable can be nothing but 1."""
        return self._lower[variable] == 1.0

    def add_at_most(self, terms: dict[int, float], most: float) -> None:
        """Add the row: sum of coefficient times variable <= most."""
        self._add_row(terms, -np.inf, most)

    def add_equal(self, terms: dict[int, float], value: float) -> None:
        """Add the row: sum of coefficient times variable = value."""
        self._add_row(terms, value, value)

    def solve(self, *, time_limit_s: float, gap: float = 0.0, relax: bool = False) -> Answer:
        """Run HiGHS, which imports SciPy.

        Args:
            time_limit_s: when to stop with the best so far.
            gap: stop at this relative gap.
            relax: let binaries be fractions.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - importing ckptsolvers brings neither SciPy nor networkx
        from scipy.sparse import csr_array  # noqa: PLC0415 - importing ckptsolvers brings neither SciPy nor networkx

        shape = (len(self._row_upper), len(self._costs))
        matrix = csr_array((self._entries, (self._rows, self._columns)), shape=shape)
        lower: Any = np.array(self._row_lower)
        upper: Any = np.array(self._row_upper)
        rows = [LinearConstraint(matrix, lower, upper)] if shape[0] else []
        variables: Any = (np.array(self._lower), np.array(self._upper))
        result = milp(
            np.array(self._costs),
            integrality=None if relax else np.array(self._integral),
            bounds=Bounds(*variables),
            constraints=rows,
            options={"time_limit": max(0.1, time_limit_s), "mip_rel_gap": gap},
        )
        bound = result.get("mip_dual_bound")
        if bound is None:
            bound = result.fun if relax and result.status == 0 else -np.inf
        return Answer(result.x, float(bound), result.status == 2)

    def _add(self, cost: float, lower: float, upper: float) -> int:
        self._costs.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        return len(self._costs) - 1

    def _add_row(self, terms: dict[int, float], lower: float, upper: float) -> None:
        row = len(self._row_upper)
        self._rows.extend([row] * len(terms))
        self._columns.extend(terms)
        self._entries.extend(terms.values())
        self._row_lower.append(lower)
        self._row_upper.append(upper)
