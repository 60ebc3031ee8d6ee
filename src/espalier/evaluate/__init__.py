"""Finding out what a model can do."""

METHODS = {
    "tasks": "tasks:evaluate_tasks",
    "iq": "iq.verb:evaluate_iq",
    "readout": "audits.readout:evaluate_readout",
    "loss": "loss:evaluate_loss",
    "density": "density:evaluate_density",
}
DEFAULT = "tasks"
