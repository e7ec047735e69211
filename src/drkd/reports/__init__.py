"""From the files of a run to tables, figures and one HTML page; nothing here computes on a model."""
