"""What is sampled: the loss around trained weights, the weights that may move, and the data."""
