"""Distill-VQ: IVF centroids and codebooks that learn a teacher's relevance and end in a stock FAISS index."""
