"""`python -m espalier`: the same as the `espalier` command."""

from espalier.cli import main

if __name__ == "__main__":
    main()
