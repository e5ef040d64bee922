"""Moving channels between activations and weights: smoothing and equalization."""
