"""The tasks that a model answers in its own words: prompts and references, and which names there are."""
