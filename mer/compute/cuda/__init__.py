"""The CUDA worker: a ComputeWorker on torch with experts in VRAM above those in memory. No other room imports torch.

`vram`, `sizes` and this file do without torch, so that planning and bookkeeping need none.
"""
