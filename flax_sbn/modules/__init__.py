"""What the modules of linen and nnx share, which knows neither."""
