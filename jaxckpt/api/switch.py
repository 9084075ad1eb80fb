"""One switch for all planning, for a run that is to be compared with plain JAX or debugged without plans."""

import functools
import logging
import os

_LOG = logging.getLogger("jaxckpt")
# Set to anything but 0, every function and step runs as plain JAX has it.
SWITCH = "JAXCKPT_DISABLE"


def is_disabled() -> bool:
    """Whether nothing is planned in this process, as the environment says; it is logged once."""
    if os.environ.get(SWITCH, "") in ("", "0"):
        return False
    _say()
    return True


@functools.cache
def _say() -> None:
    _LOG.warning("%s is set: nothing is planned, jaxckpt.jit is jax.jit", SWITCH)
