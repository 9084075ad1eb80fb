import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("solvers", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("solvers")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out of quick runs")
