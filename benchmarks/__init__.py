"""Scripts that make the numbers the project quotes."""
