"""A pass and a target for vlexport in a package of their own. Importing it loads nothing."""
