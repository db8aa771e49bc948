"""Networks and tokens: architectures, tokenizers, sampling, generation."""
