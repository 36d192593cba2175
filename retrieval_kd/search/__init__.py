"""Search: an index, the model that encodes its queries and the collection that holds its texts, together."""
