import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pool import Pool


@pytest.fixture(scope="session")
def pools():
    """One pool a backend and world size, each started once."""
    made = {}
    yield lambda *key: made.setdefault(key, Pool(*key))
    for pool in made.values():
        pool.stop()
