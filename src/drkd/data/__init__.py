"""Data sets: files to records, records to batches."""
