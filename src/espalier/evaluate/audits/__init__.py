"""What stands behind a score: whether it is knowledge, and whether it would stand another asking."""
