"""One module for each section: `run(setting)` measures it and returns its tables."""
