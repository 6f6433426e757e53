"""Public checkpoints to runs and back: Hugging Face's files, safetensors and tokenizers."""
