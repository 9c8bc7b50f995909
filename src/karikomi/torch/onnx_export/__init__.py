"""Networks as ONNX files, with the codes of quantized weights, that onnxruntime runs in integers."""
