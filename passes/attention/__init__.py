"""How raise-attention reads an attention that was written by hand."""
