"""Calibration: observers, collection and the calibration table. Nothing here yet: quantization brings it."""

if __name__ != "vlexport.calibration":
    raise ImportError("import vlexport.calibration, not calibration: the folder at the top is the package's source")
