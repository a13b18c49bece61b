"""How it is done: the library. No argument parsing, no ray.init, nothing at import."""
