"""Evaluation: measures, tests, efficiency and the report."""
