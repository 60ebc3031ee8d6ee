"""Looking inside: what a score alone doesn't tell about a model."""
