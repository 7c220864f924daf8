"""Storage: the factor file, the authors' folders and the cache."""
