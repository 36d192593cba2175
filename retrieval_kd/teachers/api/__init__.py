"""A model behind an OpenAI-compatible endpoint as teacher: requests, retries, a cache of answers, a budget."""
