"""Token reduction: selections whose length the data decides become static, and what the passes of that stage share."""
"""What the passes over tokens need beside their files."""
