"""Small files to learn from."""
