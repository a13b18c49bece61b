"""Tables of vectors: where they are (`at`), how rows come in exactly once (`stage`, `commit`), what is known of them (`ledger`)."""
