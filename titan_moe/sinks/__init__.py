"""Where numbers go: metrics.jsonl, TensorBoard, the console, Weights & Biases."""
