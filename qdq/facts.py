"""What onnx and onnxruntime have settled, and many files need."""

__all__ = ["BLOCK", "DEFAULT", "RUNTIME"]

DEFAULT = frozenset({"", "ai.onnx"})  # the two spellings of the standard's own domain
RUNTIME = "com.microsoft"  # the domain of onnxruntime's own operators
BLOCK = 16  # channels that its convolutions work on at once
