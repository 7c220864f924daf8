"""What is kept: the factor file, the authors' folders and the cache."""
