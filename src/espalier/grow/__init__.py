"""Grow: make a larger model out of a smaller one, keeping what it learned."""

METHODS = {
    "stack": "apply:grow_stack",
    "identity": "apply:grow_identity",
    "zero_pad": "apply:grow_zero_pad",
}
