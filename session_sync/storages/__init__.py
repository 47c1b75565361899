"""Where sessions are kept: one file per storage, the same methods in the same order in each."""
