"""Collections, runs, score files and vectors: what stages read and write."""
