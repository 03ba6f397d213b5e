"""Calibration: observers that see values stream by. Numpy, constant memory."""

if __name__ != "vlexport.calibration":
    raise ImportError("import vlexport.calibration, not calibration: the folder at the top is the package's source")
