"""Text in and out: tokenizer, streaming detokenizer, chat template, stop strings."""
