"""Espalier's generators as lm-eval tasks: a folder for `lm_eval --include_path`."""

from pathlib import Path

PATH = Path(__file__).parent
