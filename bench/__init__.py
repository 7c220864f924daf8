"""What is measured: each file one question, each answer a ratio taken in one run."""
