"""One life cycle for every session: lock, load, hand out, save, unlock."""
