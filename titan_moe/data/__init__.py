"""Files, documents, tokens and batches: the data pipeline."""
