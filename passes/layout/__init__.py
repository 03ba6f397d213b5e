"""How axes move through operators: what the layout passes share."""
