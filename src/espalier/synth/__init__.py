"""Data that is written, or picked by asking a model."""

METHODS = {"world": "world.write:write_world"}
