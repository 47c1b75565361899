"""One first-come-first-served lock per key, for threads, coroutines and tasks not yet begun."""
