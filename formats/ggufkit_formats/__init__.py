"""Bytes on disk: what a GGUF file, a safetensors file and a block of weights mean."""
