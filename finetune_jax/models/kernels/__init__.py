"""CPU implementations of convolution and pooling, with gradients of their own."""
