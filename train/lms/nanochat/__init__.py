"""nanochat's GPT: model, checkpoints, tokenizers."""
