"""Carry the suite out: python -m faults [--seed N] [--share S] [--repeat N] [--only PART]."""

from __future__ import annotations

import argparse
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

from faults import suite

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m faults", description=suite.__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn")
    parser.add_argument("--share", type=float, default=0.2, help="of all trials; a fifth takes 2 minutes")
    parser.add_argument("--repeat", type=int, default=1, help="times in a row; rows that differ are flakes")
    parser.add_argument("--only", choices=list(suite.PARTS), help="one part, told and not written down")
    sys.exit(suite.main(parser.parse_args()))
