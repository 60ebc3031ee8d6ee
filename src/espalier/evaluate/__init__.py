"""Finding out what a model can do."""

METHODS = {
    "loss": "loss:evaluate_loss",
    "density": "density:evaluate_density",
    "readout": "audits.readout:evaluate_readout",
}
