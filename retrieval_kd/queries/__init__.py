"""Synthetic queries for collections without labels: made from documents, or taken from a log."""
