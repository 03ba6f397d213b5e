"""What the passes over tokens need beside their files."""
