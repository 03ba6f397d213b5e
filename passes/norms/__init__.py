"""How raise-norms reads a norm that was written by hand."""
