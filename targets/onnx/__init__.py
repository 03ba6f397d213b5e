"""Program → ONNX, shared by the targets that read ONNX. Not a target."""
