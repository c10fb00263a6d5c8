"""What XLA makes of training steps for devices that are not there."""
