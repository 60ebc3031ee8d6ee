"""Data: from sources of text to rows of tokens, by way of a dataset, a tokenizer and packed shards."""

METHODS = {"prepare": "prepare:prepare_data"}
