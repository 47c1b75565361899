"""Writes its own keys into a shared folder. Usage: directory, name, number of records."""

import sys

from session_sync.storages.disk import DiskStorage

directory, name, count = sys.argv[1:]
storage = DiskStorage(directory)
for n in range(int(count)):
    storage.set(f"{name}:{n}", {"n": n, "set": {name}})
storage.close()
