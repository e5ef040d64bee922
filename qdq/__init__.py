"""Post-training QDQ quantizer for ONNX models."""
