"""Finding out what a model can do."""

METHODS = {
    "loss": "loss:evaluate_loss",
    "density": "density:evaluate_density",
    "items": "asked:evaluate_items",
    "test_taking": "audits.test_taking:evaluate_test_taking",
}
