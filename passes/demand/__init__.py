"""How narrow-to-demand works out what of a value is read."""
