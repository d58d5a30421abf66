"""The paper's tables and figures: which stages make a row, running them, and what is told of their results."""
