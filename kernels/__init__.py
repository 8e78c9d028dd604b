"""Device code. Each folder is one operation: a reference, a fast version, and shapes for its tests and benchmark."""
