"""Espalier trains, grows and evaluates language models within a stated budget."""

import os

__version__ = "0.1.0"

# Both must be set before torch loads. OpenMP threads that spin while they wait starve a shared machine. The CPU's flags
# say which instructions it has; running a test kernel for each would cost a second at every start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
