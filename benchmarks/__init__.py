"""How fast the library is, and what it keeps, next to its peers: `python -m benchmarks`."""
