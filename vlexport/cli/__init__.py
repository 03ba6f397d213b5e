"""The command line. One thin file a command group; stages do the work."""
