"""Several compiles at a time, as many as there are cores."""

import concurrent.futures
import contextvars
import os
from collections.abc import Callable, Iterable

from jaxckpt.compilation.measure import SHOW, Measurement, show_nothing, watched


def side_by_side(programs: Iterable[Callable[[], Measurement]]) -> list[Measurement]:
    """Compile lowered programs, as many at a time as there are cores, while the next ones are lowered.

    Args:
        programs: what `lowered_for` returns; an iterator lowers each only when it is asked for.

    Returns:
        What each takes, in order.

    Raises:
        CompilerError: the first one that failed.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_cores == 1:
        return [program() for program in programs]
    context = contextvars.copy_context()
    # One line says that they compile, not one line each.
    context.run(SHOW.set, show_nothing)
    with watched("several plans side by side"), concurrent.futures.ThreadPoolExecutor(num_cores) as pool:
        # A context is entered by one thread at a time.
        running = [pool.submit(context.copy().run, program) for program in programs]
        return [each.result() for each in running]
