"""A trained model for other programs: jax program, weights, ONNX, model card."""
