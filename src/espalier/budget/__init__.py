"""Budget: what a model costs to train and to ask, in FLOPs, bytes, seconds, money, energy and carbon, beforehand."""

METHODS = {
    "plan": "espalier.propose:plan",
    "bench": "hardware:bench",
    "count": "count:count",
    "fit": "fit:budget_fit",
    "predict": "scaling:predict",
    "ladder": "espalier.ladder:ladder",
    "tune": "espalier.tune:tune",
    "roofline": "verbs:roofline",
    "profile": "espalier.infer.profile:profile",
    "queries": "verbs:queries",
    "finetune": "finetune:finetune",
    "lifecycle": "lifecycle:lifecycle",
    "placement": "placing:place",
}
