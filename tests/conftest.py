"""What every test has: caches of its own."""

import pytest


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No test sees the caches of its user or of another test."""
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))
