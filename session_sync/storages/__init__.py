"""Where sessions are kept: one file per storage, the same methods in the same order in each."""

from . import background as background  # before the pools of threads: see background.at_exit()
