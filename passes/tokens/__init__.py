"""Token reduction: selections whose length the data decides become static, and what the passes of that stage share."""
