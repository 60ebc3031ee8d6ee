"""Finding out what a model can do."""

METHODS = {"loss": "loss:evaluate_loss", "density": "density:evaluate_density", "iq": "iq.verb:evaluate_iq"}
