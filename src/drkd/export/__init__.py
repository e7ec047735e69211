"""A student as an ONNX file: the graph, the check against PyTorch, the detector behind the file, int8."""
