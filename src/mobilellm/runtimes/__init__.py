"""One protocol over what runs a model file: ours, llama.cpp, onnxruntime, ExecuTorch."""
