"""The proof that a training model is what it should be."""
