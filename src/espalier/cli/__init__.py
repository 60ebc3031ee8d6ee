"""The command line: one file a verb. `main` turns every refusal into four lines and an exit code."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `espalier` command."""
    from espalier import torchrun
    from espalier.cli.app import run_app

    sys.exit(torchrun.ended(run_app(sys.argv[1:])))
