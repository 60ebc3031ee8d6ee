"""Budget: what a model costs to train, in FLOPs, bytes, seconds, money, energy and carbon, before it is trained."""

METHODS = {"bench": "hardware:bench", "finetune": "finetune:finetune"}
