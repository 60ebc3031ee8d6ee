"""The fault suite: what Espalier survives, tried out and counted. `python -m faults` writes docs/reliability.md."""
