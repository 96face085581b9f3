"""Files in and out: model configuration, safetensors, GGUF, tokenizer, chat template. Needs no PyTorch."""
