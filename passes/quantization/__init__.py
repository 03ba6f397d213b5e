"""What quantize decides: which calls, at which scales."""
