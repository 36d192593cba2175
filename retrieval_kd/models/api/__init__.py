"""An OpenAI-compatible endpoint over HTTP: requests, retries, a cache of answers, a budget."""
