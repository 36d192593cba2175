"""Loading a model by any name and running it over texts."""
