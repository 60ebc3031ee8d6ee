"""Grow: make a larger model out of a smaller one, keeping what it learned."""

METHODS = {
    "stack": "verbs:grow_stack",
    "interpolate": "verbs:grow_interpolate",
    "gradual": "verbs:grow_gradual",
    "overlap": "verbs:grow_overlap",
    "identity": "verbs:grow_identity",
    "zero_pad": "verbs:grow_zero_pad",
    "fpi": "verbs:grow_fpi",
    "aki": "verbs:grow_aki",
    "learned": "verbs:grow_learned",
    "reach": "verbs:grow_reach",
    "upcycle": "verbs:grow_upcycle",
    "check": "verbs:grow_check",
    "compare": "espalier.compare:grow_compare",
    "when": "when:grow_when",
    "search": "espalier.compare:grow_search",
}
