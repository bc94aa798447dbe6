"""Checkpoints for other libraries and from them: Hugging Face, Megatron-core, and models of other sizes."""
