"""Device code: each folder is one operation with a reference, a fast version and the shapes they are tested at."""
