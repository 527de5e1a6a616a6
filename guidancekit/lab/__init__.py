"""The laboratory: what each method really does, measured where the truth is known."""
