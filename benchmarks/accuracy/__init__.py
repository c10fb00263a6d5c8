"""What sampled statistics do to gradients and to evaluation."""
