"""What a finished sequence is worth to a model: views of it with tokens hidden, and the scores of what was hidden."""
