"""How long layers and training steps take on the device there is."""
