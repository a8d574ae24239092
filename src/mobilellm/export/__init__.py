"""Programs and files for runtimes: ExecuTorch, ONNX, a web page."""
