"""What the least of ||W − BA||_F² is and how it is reached: by the paper's Adam or by a Krylov space."""
