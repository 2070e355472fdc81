"""Scores of clients, the controls they stand beside, and the report of a run."""
