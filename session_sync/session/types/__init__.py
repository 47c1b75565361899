"""What declared types mean for the values of a field: see `base`."""
