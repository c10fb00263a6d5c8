"""What the scripts are made of: data, methods, the training step, loops, results."""
