"""Finding out what a model can do."""

METHODS = {
    "tasks": "tasks:evaluate_tasks",
    "iq": "iq.verb:evaluate_iq",
    "items": "asked:evaluate_items",
    "needle": "needle:evaluate_needle",
    "readout": "audits.readout:evaluate_readout",
    "test_taking": "audits.test_taking:evaluate_test_taking",
    "loss": "loss:evaluate_loss",
    "density": "density:evaluate_density",
    "stages": "stages:evaluate_stages",
    "compare": "compare:evaluate_compare",
}
DEFAULT = "tasks"
