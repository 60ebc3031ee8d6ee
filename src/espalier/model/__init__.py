"""Model: build, load, name the axes of, and reshape causal language models."""
