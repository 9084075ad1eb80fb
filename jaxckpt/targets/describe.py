"""Devices that are not here, as JAX describes them to their compilers."""

import os
from typing import Any

from jax.experimental import topologies


def described_devices(**asked: str) -> tuple[Any, ...]:
    """The devices of a description; no driver and no chip is looked for.

    Args:
        **asked: as in `topologies.get_topology_desc`.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return tuple(topologies.get_topology_desc(**asked).devices)
