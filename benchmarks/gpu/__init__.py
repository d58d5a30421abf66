"""One visit to a GPU: :mod:`benchmarks.gpu.__main__`."""
