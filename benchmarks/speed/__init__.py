"""How long layers and training steps take on this device."""
