"""Scores of a recogniser against reference text, and the report that shows them."""
