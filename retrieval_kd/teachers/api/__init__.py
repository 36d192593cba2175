"""A model behind an OpenAI-compatible endpoint as teacher: log-odds, grades or ranks."""
