import multiprocessing

import pytest


@pytest.fixture
def forks(monkeypatch):
    """What a benchmark asks to be spawned is forked, so that it need not import everything again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
