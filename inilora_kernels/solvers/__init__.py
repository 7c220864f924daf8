"""The minimum of ||W − BA||_F² and how to reach it: by the paper's Adam or by a Krylov space."""
