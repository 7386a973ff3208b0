"""The initial state: random values, schemes, pretrained weights, embeddings."""
