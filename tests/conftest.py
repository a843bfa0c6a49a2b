"""What several test files share."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# The same examples on every run and machine; time limits would depend on the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


class FilesButExercises(LoadFileScheduling):
    """A file's tests stay on one worker, as cells need it; exercises are spread.

    Each test of test_exercises.py runs a whole chapter, and none needs another.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return nodeid if file.endswith("test_exercises.py") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesButExercises:
    return FilesButExercises(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Where real samples lie beside the repository; skips where they do not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real samples (../shared/data) are not on this machine")
    return folder
