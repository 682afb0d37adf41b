import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """The CLIP example, also in forks, draws no pictures, which take longer than a tiny run and have tests of their own."""
    from wmateacher.integrations.clip import plots

    for name in ("picture", "reliability", "course"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
