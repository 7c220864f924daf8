"""Reading models: a checkpoint's files, its architecture, and the matrices to factorize."""
