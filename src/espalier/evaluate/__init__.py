"""Finding out what a model can do."""

METHODS = {
    "loss": "loss:evaluate_loss",
    "density": "density:evaluate_density",
    "needle": "needle:evaluate_needle",
    "stages": "stages:evaluate_stages",
    "compare": "compare:evaluate_compare",
}
