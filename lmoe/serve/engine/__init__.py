"""What runs the model: Transformers' continuous batching, with the weights of each request at each of its tokens."""
