"""The demonstration: real photographs, a real encoder, found by real words. `make demo` runs it."""
