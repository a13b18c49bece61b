"""When it is done: one file is one command, with the .yaml beside it that runs as it is."""
