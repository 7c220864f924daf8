"""What is read: a checkpoint's files, its architecture, and the matrices to factorize."""
