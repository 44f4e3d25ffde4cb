"""What the paper's figures show besides scores: one analysis a file, see registry.py."""
