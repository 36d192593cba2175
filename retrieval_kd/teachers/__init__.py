"""Teachers: whatever can say how relevant a document is to a query; they write score files."""
