"""How good is a model: held-out text and in-context recall."""
