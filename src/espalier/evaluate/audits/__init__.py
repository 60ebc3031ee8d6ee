"""Looking behind a score: where it comes from, and whether it is knowledge."""
