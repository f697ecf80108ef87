"""One random tiny model per architecture, as transformers builds it, written as GGUF."""
