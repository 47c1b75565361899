"""A session: its fields and their types, the key that it has, and what is stored of it."""
