"""Hugging Face's format: folders of safetensors with config.json, both ways."""
