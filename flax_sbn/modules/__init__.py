"""What the modules of Linen and NNX share, which knows neither."""
