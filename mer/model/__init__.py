"""GGUF architectures as pure data: hyperparameters, tensor names and the layer plan, one small file each."""
