"""Which neurons carry a prediction: quadrature, the search for paths, the other methods."""
