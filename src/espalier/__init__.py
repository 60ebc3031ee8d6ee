"""Espalier trains, grows and evaluates language models within a stated budget."""

import os

__version__ = "0.1.0"

# OpenMP threads that spin while they wait starve a shared machine; this must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
