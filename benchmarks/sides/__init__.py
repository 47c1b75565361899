"""One module for each side of the comparison: how it handles an update, in its fastest documented
setting. Each function makes a store with a session in it, and returns the work on that."""
