"""Finding out what a model can do."""

METHODS = {
    "tasks": "tasks:evaluate_tasks",
    "iq": "iq.verb:evaluate_iq",
    "needle": "needle:evaluate_needle",
    "readout": "audits.readout:evaluate_readout",
    "loss": "loss:evaluate_loss",
    "density": "density:evaluate_density",
    "stages": "stages:evaluate_stages",
    "compare": "compare:evaluate_compare",
}
DEFAULT = "tasks"
