"""What several test files share."""

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run and machine; time limits would depend on the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Where real samples lie beside the repository; skips where they do not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real samples (../shared/data) are not on this machine")
    return folder
